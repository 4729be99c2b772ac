"""Norms of DoRA's weights once a step instead of once a chunk and pass.

DoRA divides by the row norms of W + s B A, which its paper takes for constants of the backward pass (arXiv 2402.09353,
section 4.3). They change only with the weights, that is between steps; peft computes them in every forward pass, with
B A as a full matrix. For long chunks it does not show; for the short chunks of a cached step it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def _dora_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.lora.dora import DoraLinearLayer

    return [layer for layer in module.modules() if type(layer) is DoraLinearLayer]


def _remember(layer: Any) -> None:
    """Let the two methods that make up the norm compute once; they shadow the class's methods until deleted."""
    norm: list[Tensor] = []
    lora_weight: Callable[..., Tensor] = layer.get_lora_weight
    weight_norm: Callable[..., Tensor] = layer.get_weight_norm

    def lora_weight_once(lora_A: Any, lora_B: Any, **options: Any) -> Tensor:
        return norm[0] if norm else lora_weight(lora_A=lora_A, lora_B=lora_B, **options)  # only the norm reads it

    def weight_norm_once(**options: Any) -> Tensor:
        if not norm:
            norm.append(weight_norm(**options).detach())
        return norm[0]

    layer.get_lora_weight, layer.get_weight_norm = lora_weight_once, weight_norm_once


@contextlib.contextmanager
def norms_once(module: nn.Module) -> Iterator[None]:
    """Within the context, in which no weight may change, each DoRA layer of `module` computes its norm once."""
    layers = _dora_layers(module)
    for layer in layers:
        _remember(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.get_lora_weight, layer.get_weight_norm
