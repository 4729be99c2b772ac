"""Layers in 4 bit: the weights that they stand for, and a step that is the one of those weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from golden_data import GoldenPairs
from torch import nn

from b3 import Embedder
from b3.config import load_config
from b3.errors import ConfigError, InputError, RunError
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.backbones.tiny import make_tiny_model
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE
from b3.train.run import check_machine
from b3.train.step import CachedStep

# Dettmers et al. 2023, appendix E: the 16 values of NF4.
VALUES = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight with each block of 64 at its nearest values, and each number's block's largest magnitude."""
    blocks = weight.flatten().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    chosen = VALUES[(blocks[..., None] / largest[..., None] - VALUES).abs().argmin(dim=-1)]
    return (chosen * largest).view_as(weight), largest.expand_as(blocks).reshape(weight.shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As wide as a block: bitsandbytes on a CPU reads narrower rows wrongly."""
    texts = ["a red square number what is the shape of a blue disc 0123456789"] * 3
    return make_tiny_model(tmp_path / "model", texts, hidden=64, layers=2, vision_layers=1, vocab_size=400)


def linear_layers(model: Embedder) -> dict[str, Any]:
    return {name: m for name, m in model.core.language_model.layers.named_modules() if isinstance(m, nn.Linear)}  # type: ignore[attr-defined]


def test_weights_are_those_of_the_paper(folder: Path) -> None:
    """To the rounding of the magnitudes to 8 bits; nothing outside the decoder layers changes."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    from b3.model.quantize import quantize_layers

    before, model = (Embedder.from_pretrained(folder, dtype="float32") for _ in range(2))
    count = quantize_layers(model, torch.float32)
    found, expected = linear_layers(model), linear_layers(before)
    assert count == len(found) == 7 * 2
    for name, module in found.items():
        dense = dequantize_4bit(module.weight.data, module.weight.quant_state)
        ours, largest = nearest(expected[name].weight)
        assert module.weight.dtype == torch.uint8
        assert ((dense - ours).abs() <= 0.02 * largest + 1e-6).float().mean() > 0.999, name
        if module.bias is not None:
            assert torch.equal(module.bias, expected[name].bias)
    inside = [f"model.language_model.layers.{name}.weight" for name in found]
    state, rest = before.backbone.state_dict(), model.backbone.state_dict()
    for name, value in state.items():
        if name not in inside:
            assert torch.equal(rest[name], value), name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_that_of_the_rounded_weights(folder: Path, dora: bool, autocast: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    from b3.model.quantize import quantize_layers

    four, dense = (Embedder.from_pretrained(folder, dtype="float32") for _ in range(2))
    quantize_layers(four, torch.bfloat16 if autocast else torch.float32)
    with torch.no_grad():
        for name, module in linear_layers(dense).items():
            weight = linear_layers(four)[name].weight
            module.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    results = []
    for model in (four, dense):
        torch.manual_seed(0)
        model.backbone = attach_adapter(model.backbone, AdapterSpec(4, 16, 0.0, dora))
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        inputs = StepCollator([GoldenPairs()], model.processor, 64)([(0, i) for i in range(6)])  # type: ignore[list-item]
        result = CachedStep(model.train(), InfoNCE(), autocast=autocast)(inputs, 0)
        results.append((result.loss, tiny.gradients(model)))
    (loss, gradients), (expected, others) = results
    limit = 0.05 if autocast else 1e-4
    assert loss == pytest.approx(expected, rel=limit)
    assert gradients.keys() == others.keys() and len(others) > 10
    if not autocast:
        for name, value in others.items():
            assert tiny.relative(gradients[name], value) < limit, name


def test_the_size_of_a_model_counts_weights_not_bytes(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from b3.model.quantize import quantize_layers

    model = Embedder.from_pretrained(folder, dtype="float32")
    before = model.cost().text.weights
    quantize_layers(model, torch.float32)
    assert model.cost().text.weights == before


def test_its_adapter_loads_on_the_whole_weights(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from b3.model.quantize import quantize_layers

    four, whole = (Embedder.from_pretrained(folder, dtype="float32") for _ in range(2))
    quantize_layers(four, torch.float32)
    for model in (four, whole):
        torch.manual_seed(0)
        model.backbone = attach_adapter(model.backbone, AdapterSpec(4, 16, 0.0, use_dora=False))
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    four.save(tmp_path / "run")
    loaded = Embedder.from_pretrained(folder, adapter=tmp_path / "run", dtype="float32")
    items = [GoldenPairs().target(i) for i in range(8)]
    assert abs(loaded.encode(items) - whole.eval().encode(items)).max() < 1e-5
    assert (loaded.encode(items) * four.eval().encode(items)).sum(axis=1).min() > 0.9


def test_a_model_without_decoder_layers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from b3.model.quantize import quantize_layers

    model = Embedder.from_pretrained(tiny.write_text_model(tmp_path), dtype="float32")
    with pytest.raises(InputError, match=r"model.quantize is for decoder layers, and a text encoder has none"):
        quantize_layers(model, torch.float32)


def test_where_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.write_recipe(tmp_path)
    with pytest.raises(RunError, match=r"model.quantize nf4 needs a GPU and none is visible"):
        check_machine(load_config(recipe, ["model.quantize=nf4"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"model.quantize nf4 needs bitsandbytes; pip install bitsandbytes"):
        check_machine(load_config(recipe, ["model.quantize=nf4"]))
    for more, other in (("model.train=full", "model.train full"), ("model.shard=true", "model.shard")):
        with pytest.raises(ConfigError, match=f"frozen weights that each rank holds, not for {other}"):
            load_config(recipe, ["model.quantize=nf4", more])
    with pytest.raises(ConfigError, match=r"model.quantize"):
        load_config(recipe, ["model.quantize=int8"])
