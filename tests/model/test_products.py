"""Float32 products by oneDNN: those of float64 up to rounding, in wide models on a CPU and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from b3 import Embedder
from b3.data.items import as_item
from b3.model import products
from b3.model.adapter import AdapterSpec, attach_adapter, norms_once
from b3.model.backbones.tiny import make_tiny_model
from b3.model.batch import collate
from b3.model.products import NARROW, OneDNNLinear, product, use_onednn, uses_onednn

pytestmark = [
    pytest.mark.skipif(not products._is_usable(), reason="this processor has no AVX-512, or torch no oneDNN"),
    pytest.mark.filterwarnings("ignore:TF32"),  # of torch, where a flag of oneDNN is set
]
TEXTS = ["a red square", "a blue circle on a lamp", "house, tree and river; the cat sleeps", "a"]


def random(*shape: int, needs_grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=needs_grad)


@pytest.mark.parametrize("shape", [(1, 67, 48), (1059, 48), (2, 3, 5, 48), (1, 48)])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
def test_products_and_gradients_are_those_of_float64(shape: tuple[int, ...], needed: tuple[bool, bool, bool]) -> None:
    parts = [random(*s, needs_grad=n) for s, n in zip((shape, (96, 48), (96,)), needed, strict=True)]
    exact = [part.detach().double().requires_grad_(part.requires_grad) for part in parts]
    output, wanted = product(*parts), linear(*exact)
    assert type(output.grad_fn).__name__ == "_ProductBackward"
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    grad = random(*wanted.shape)
    output.backward(grad)
    wanted.backward(grad.double())
    for part, other in zip(parts, exact, strict=True):
        assert (part.grad is None) == (other.grad is None)
        if part.grad is not None and other.grad is not None:
            bound = 1e-5 * float(other.grad.abs().max())
            torch.testing.assert_close(part.grad.double(), other.grad, rtol=0, atol=bound)


def test_what_is_not_contiguous_multiplies_as_well() -> None:
    x, weight = random(48, 37).t(), random(48, 96).t()
    torch.testing.assert_close(product(x, weight), linear(x.double(), weight.double()).float(), rtol=1e-5, atol=1e-4)


def test_a_few_programs_serve_all_numbers_of_rows() -> None:
    numbers = {products._rounded(rows) for rows in range(1, 8193)}
    assert len(numbers) < 200
    assert all(0 <= products._rounded(rows) - rows <= rows / 16 for rows in range(1, 8193))


def test_rows_are_filled_up_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """They enter the gradient of a weight. New memory is nan here, not what lies there by chance."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        x = random(2, 35, 6)
        filled = products._filled_up(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(filled) == products._rounded(70) == 72
    assert torch.equal(filled[:70], x.flatten(0, 1)) and not filled[70:].any()


def test_other_numbers_and_passes_stay_with_torch() -> None:
    x, weight = random(8, 48), random(96, 48)
    torch.testing.assert_close(
        product(x.double(), weight.double()), linear(x.double(), weight.double()), rtol=0, atol=0
    )
    torch.testing.assert_close(product(x[:0], weight), linear(x[:0], weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(product(x, weight), linear(x, weight), rtol=0, atol=0)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), linear(x, weight), rtol=0, atol=0)


def wide(folder: Path) -> Embedder:
    make_tiny_model(folder, TEXTS * 10, hidden=NARROW)
    return Embedder.from_pretrained(folder, dtype="float32", device="cpu")


def vectors(model: Embedder) -> Tensor:
    embedded: Tensor = model(collate([model.processor(as_item({"text": text})) for text in TEXTS]))
    return embedded


def test_a_wide_model_gives_the_vectors_and_gradients_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter (DoRA under dropout, whose frozen product is made apart) and in the vision tower as well."""
    calls, operator = [], products._ONEDNN
    monkeypatch.setattr(products, "_ONEDNN", lambda *parts: (calls.append(1), operator(*parts))[1])
    model = wide(tmp_path)
    assert "oneDNN" in model.numerics and uses_onednn(model.core.visual)
    model.backbone = attach_adapter(model.backbone, AdapterSpec())
    model.train()
    found, counts = [], []
    for usable in (True, False):
        torch.manual_seed(0)
        with torch.backends.mkldnn.flags(enabled=usable), norms_once(model.backbone):
            embedded = vectors(model)
            (embedded * random(*embedded.shape)).sum().backward()
        found.append([embedded.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
        counts.append(len(calls))
    assert len(found[0]) > 20
    assert counts[0] == counts[1] > 50  # the first time oneDNN, the second time not
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


def test_adapters_of_a_wide_model_multiply_by_it_too(tmp_path: Path) -> None:
    model = attach_adapter(wide(tmp_path).backbone, AdapterSpec(use_dora=False))
    assert all(type(module) is not nn.Linear for module in model.modules())
    assert sum(type(module) is OneDNNLinear for name, module in model.named_modules() if ".lora_A." in name) > 0


def test_a_narrow_model_stays_as_it_is(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, TEXTS * 10, hidden=NARROW // 2)
    model = Embedder.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert not uses_onednn(model) and "oneDNN" not in model.numerics
    assert not uses_onednn(attach_adapter(model.backbone, AdapterSpec(use_dora=False)))


def test_a_model_in_bfloat16_stays_as_it_is(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, TEXTS * 10, hidden=NARROW)
    assert not uses_onednn(Embedder.from_pretrained(tmp_path, dtype="bfloat16", device="cpu"))


def test_it_is_left_out_where_a_processor_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    layer = nn.Linear(256, 256)
    use_onednn(layer)
    assert type(layer) is nn.Linear
