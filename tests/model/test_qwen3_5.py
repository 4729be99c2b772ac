"""Qwen3.5: neither the state nor the convolution of its linear attention carries anything from item to item."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from b3 import Embedder
from b3.data.items import Item
from b3.model.backbones.qwen3_5 import Qwen3_5
from b3.model.batch import Batch, collate

TEXTS = ["a red square number", "a blue circle on a lamp", "house, tree and river; the cat sleeps"] * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = Qwen3_5.tiny(tmp_path_factory.mktemp("qwen3_5"), TEXTS)
    model = Embedder.from_pretrained(folder, dtype="float32")
    linear(model).A_log.data.fill_(-4.0)  # a state that lasts: fresh ones forget most of a token at the next
    return model


def linear(model: Embedder) -> Any:
    return model.layers()[0].linear_attn


def batch(model: Embedder, *texts: str) -> Batch:
    return collate([model.processor(Item(text)) for text in texts])


def vectors(model: Embedder, *texts: str) -> np.ndarray:
    with torch.no_grad():
        return model(batch(model, *texts)).numpy()


SECOND = "the cat sleeps"
FIRST = ["a red square number", "a blue lamp circle",  # of equal length
         "river; house, tree and lamp " * 30]  # fmt: skip


def test_an_item_does_not_see_the_one_before_it(model: Embedder) -> None:
    a, b, longer = (vectors(model, first, SECOND)[1] for first in FIRST)
    assert len({len(model.processor(Item(first)).input_ids) for first in FIRST[:2]}) == 1
    assert np.array_equal(a, b)  # equal shapes: the same bytes
    assert np.abs(a - longer).max() < 1e-6
    assert np.abs(a - vectors(model, SECOND)[0]).max() < 1e-6
    assert np.abs(vectors(model, FIRST[0], "cat sleeps")[1] - a).max() > 1e-2  # its own first token reaches it


def test_upstreams_layer_would_carry_it_over(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would notice: run on the packed row as it is, the layer lets items meet."""
    layer = linear(model)

    def row(hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        output: torch.Tensor = type(layer).forward(layer, hidden_states)
        return output

    monkeypatch.setattr(layer, "forward", row)
    a, b = (vectors(model, first, SECOND)[1] for first in FIRST[:2])
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_cross_items(model: Embedder, checkpointing: bool) -> None:
    """Of the second vector, none reaches the tokens of the first; those of its own are as if it were alone."""
    weight = model.core.language_model.embed_tokens.weight  # type: ignore[attr-defined]
    direction = torch.randn(model.dim, generator=torch.Generator().manual_seed(0))
    try:
        weight.requires_grad_(True)
        if checkpointing:
            model.backbone.gradient_checkpointing_enable()  # type: ignore[operator]
        model.train()
        gradients = []
        for texts in ((FIRST[0], SECOND), (SECOND,)):
            weight.grad = None
            (model(batch(model, *texts))[-1] @ direction).backward()
            gradients.append(weight.grad.clone())
    finally:
        weight.requires_grad_(False)
        weight.grad = None
        model.backbone.gradient_checkpointing_disable()  # type: ignore[operator]
        model.eval()
    own = set(model.processor(Item(SECOND)).input_ids.tolist())
    foreign = sorted(set(model.processor(Item(FIRST[0])).input_ids.tolist()) - own)
    assert foreign and not gradients[0][foreign].any()
    assert gradients[1].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()


def test_adapters_go_on_both_kinds_of_layers(model: Embedder) -> None:
    targets = type(model).adapter_targets
    assert isinstance(targets, str)
    names = [
        n for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(targets, n)
    ]
    assert names == [
        f"model.language_model.layers.{place}"
        for place in (
            "0.linear_attn.out_proj", "0.linear_attn.in_proj_qkv", "0.linear_attn.in_proj_z", "0.mlp.down_proj",
            "1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj", "1.self_attn.o_proj", "1.mlp.down_proj",
        )
    ]  # fmt: skip


def test_linear_attention_has_its_buckets_whatever_full_attention_reads(model: Embedder) -> None:
    model.core.language_model.config._attn_implementation, before = (  # type: ignore[attr-defined]
        "b3_varlen_flash",
        model.core.language_model.config._attn_implementation,  # type: ignore[attr-defined]
    )
    try:
        assert model.layout(batch(model, *FIRST)).known_buckets is not None
    finally:
        model.core.language_model.config._attn_implementation = before  # type: ignore[attr-defined]


def test_the_state_survives_a_checkpoint_in_16_bit(model: Embedder, tmp_path: Path) -> None:
    """bfloat16 keeps the vector to the precision of 16 bit: the rule itself runs in float32."""
    model.save(tmp_path)
    half = Embedder.from_pretrained(tmp_path, dtype="bfloat16")
    texts = [*FIRST, SECOND]
    assert (half.encode(texts) * model.encode(texts)).sum(axis=1).min() > 0.998


def test_attention_costs_what_its_layer_has(model: Embedder) -> None:
    """One of two layers attends to whole sequences, with four heads of 32."""
    text = model.cost().text
    assert text.attention == 4 * 32 and text.layers == 2
    language = model.core.language_model  # type: ignore[attr-defined]
    assert text.weights == sum(m.weight.numel() for m in language.modules() if isinstance(m, torch.nn.Linear))
