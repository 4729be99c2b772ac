"""Linear layers in float32 on a CPU, multiplied by oneDNN.

Torch leaves float32 products to MKL, which on other makers' processors uses half of their vector width: 108 GFLOP/s on
a core of the fifth EPYC generation, where oneDNN, part of the same torch, does 190 to 230 (benchmarks/products.py).
Results differ by rounding: root mean squares of the errors are 2 to 6e-7 of that of the products, MKL's 2 to 3e-7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NARROW = 128  # width below which a model stays as it is: its time is spent elsewhere
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a model multiply by oneDNN, on a CPU and in float32, if this processor gains by it.

    Names, weights and what `isinstance` says of them stay.
    """
    if _is_usable():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


def uses_onednn(model: nn.Module) -> bool:
    """Whether a layer of a model multiplies by oneDNN."""
    return any(isinstance(module, OneDNNLinear) for module in model.modules())


class OneDNNLinear(nn.Linear):
    """`torch.nn.Linear`; float32 products on a CPU are oneDNN's."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: (..., in) by (out, in); float32 on a CPU by oneDNN where it has AVX-512."""
    fits = (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # a compiler chooses for itself
    )
    if not (fits and _is_usable()):
        return linear(x, weight, bias)
    output: Tensor = _Product.apply(x, weight, bias)
    return output


def _is_usable() -> bool:
    """MKL is as fast on what lacks AVX-512; the operator is not part of torch's interface, and may go."""
    mkldnn = torch.backends.mkldnn
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return _ONEDNN is not None and mkldnn.is_available() and bool(mkldnn.enabled) and capable


def _rounded(rows: int) -> int:
    """Up to one of sixteen numbers between powers of two.

    For every number of rows oneDNN writes a program, in milliseconds and of half a megabyte, and keeps a thousand:
    batches of all sizes would cost a gigabyte.
    """
    step = _step(rows)
    return -(-rows // step) * step


def _step(rows: int) -> int:
    return 1 << max(0, rows.bit_length() - 5)


def _filled_up(x: Tensor) -> Tensor:
    """(N, D) of (..., D), followed by as many zeros as it takes."""
    rows = x.reshape(-1, x.shape[-1])
    number = _rounded(len(rows))
    if number == len(rows):
        return rows
    filled = rows.new_empty(number, rows.shape[1])
    filled[: len(rows)], filled[len(rows) :] = rows, 0
    return filled


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = _ONEDNN(_filled_up(x), weight, bias, "none", [], "")
    return output[: x.numel() // x.shape[-1]].view(*x.shape[:-1], len(weight))


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """(out, in) of (N, out) and (N, in): the sum of the outer products of a round number of rows, and of the rest."""
    whole = len(grad) // _step(len(grad)) * _step(len(grad))
    total: Tensor = _ONEDNN(grad[:whole].t(), x[:whole].t(), None, "none", [], "")
    if whole < len(grad):
        total += _ONEDNN(_filled_up(grad[whole:]).t(), _filled_up(x[whole:]).t(), None, "none", [], "")
    return total


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        by_x = _multiply(grad, weight.t()) if needs_x else None
        by_weight = _summed(rows, x.reshape(-1, x.shape[-1])) if needs_weight else None
        return by_x, by_weight, rows.sum(dim=0) if needs_bias else None
