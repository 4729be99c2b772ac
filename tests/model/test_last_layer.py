"""The last decoder layer runs its MLP for pooled tokens alone, and nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from b3 import Embedder, registry
from b3.data.items import as_item
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.batch import collate
from b3.model.last_layer import keeps_last_tokens
from b3.train.metrics import tower_flops

KINDS = [name for name in registry.BACKBONES if registry.load("backbone", name).reads_images]
TEXTS = ["a red square", "a blue circle on a lamp", "house, tree and river; the cat sleeps", "a"]


def load(folder: Path) -> Embedder:
    return Embedder.from_pretrained(folder, dtype="float32")


def vectors(model: Embedder) -> Tensor:
    embedded: Tensor = model(collate([model.processor(as_item({"text": text})) for text in TEXTS]))
    return embedded


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_mlp_runs_for_pooled_tokens(kind: str, tmp_path: Path) -> None:
    model = load(registry.load("backbone", kind).tiny(tmp_path, TEXTS * 10))
    seen: list[int] = []
    for layer in model.layers():
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    vectors(model)
    assert seen[-1] == len(TEXTS) < seen[0] == sum(len(model.processor(as_item({"text": t})).input_ids) for t in TEXTS)


def test_operations_are_those_that_run(tmp_path: Path) -> None:
    """Of linear layers, as torch counts them; what a run counts leaves out the last tokens' MLP."""
    model = load(registry.load("backbone", "qwen2_vl").tiny(tmp_path, TEXTS * 10))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vectors(model)
    counts = counter.get_flop_counts()["Global"]
    run = sum(counts.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    tower, num_tokens = model.cost().text, sum(len(model.processor(as_item({"text": t})).input_ids) for t in TEXTS)
    pooled, _ = tower.pooled
    assert pooled == sum(p.numel() for p in model.layers()[-1].mlp.parameters()) > 0
    assert tower_flops(tower, num_tokens, 0, backward=False) == run - 2 * pooled * len(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_gradients_are_those_of_the_whole_layer(kind: str, tmp_path: Path) -> None:
    model = load(registry.load("backbone", kind).tiny(tmp_path, TEXTS * 10)).double()
    spec = AdapterSpec(dropout=0.0, target_modules=r".*language_model\..*(q_proj|o_proj|gate_proj|down_proj)")
    model.backbone = attach_adapter(model.backbone, spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) / 10
    found = []
    for is_whole in (False, True):
        if is_whole:
            last = model.layers()[-1]
            del last.forward, last.keeps_last_tokens
        embedded = vectors(model)
        weights = torch.linspace(-1, 1, embedded.numel(), dtype=embedded.dtype).view_as(embedded)
        found.append((embedded, *torch.autograd.grad((embedded * weights).sum(), trained)))
    assert any("layers.1.mlp.gate_proj" in name for name, p in model.named_parameters() if p.requires_grad)
    for kept, whole in zip(*found, strict=True):
        assert whole.abs().max() > 0
        assert (kept - whole).abs().max() < 1e-6 * whole.abs().max()  # norms are in float32


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qwen3_vl", lambda text: {"num_hidden_layers": 1}),  # DeepStack adds to the only layer
        ("qwen3_5", lambda text: {"layer_types": text["layer_types"][::-1]}),  # linear attention comes last
    ],
)
def test_layers_that_others_read_stay_whole(
    kind: str, change: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = registry.load("backbone", kind)
    module = sys.modules[backbone.__module__]
    make = module.make_tiny_qwen
    monkeypatch.setattr(
        module, "make_tiny_qwen", lambda f, t, k, text, *rest: make(f, t, k, {**text, **change(text)}, *rest)
    )
    model = load(backbone.tiny(tmp_path, TEXTS * 10))
    assert not keeps_last_tokens(model.core.language_model)
    assert vectors(model).shape == (len(TEXTS), model.dim)
    alone = torch.cat([model(collate([model.processor(as_item({"text": text}))])) for text in TEXTS])
    assert (vectors(model) - alone).abs().max() < 2e-6
