"""Norms of DoRA once per step: the same bits as peft's, computed once, and gone afterwards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from golden_data import checkpoint, collator, embedder
from tiny import gradients

from b3.model.adapter import _dora_layers
from b3.train import step as gradcache
from b3.train.losses.info_nce import InfoNCE
from b3.train.step import CachedStep

PLAIN = InfoNCE(mask_duplicates=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_peft(folder: Path, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(folder, "dora", dropout)
    inputs = collator(model, 64)([(0, i) for i in range(8)])
    CachedStep(model, PLAIN)(inputs, 0)
    ours = gradients(model)
    monkeypatch.setattr(gradcache, "norms_once", lambda module: contextlib.nullcontext())
    CachedStep(model, PLAIN)(inputs, 0)
    for name, value in gradients(model).items():
        assert torch.equal(ours[name], value), name


def test_one_norm_a_step_and_new_ones_after_the_optimiser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    model = embedder(folder, "dora")
    calls = []
    original = DoraLinearLayer.get_weight_norm
    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", lambda s, **k: calls.append(1) or original(s, **k))
    inputs = collator(model, 64)([(0, i) for i in range(8)])
    first = CachedStep(model, PLAIN)(inputs, 0)
    assert len(calls) == len(_dora_layers(model)) > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    second = CachedStep(model, PLAIN)(inputs, 0)
    assert len(calls) == 2 * len(_dora_layers(model))
    assert second.loss != first.loss
    assert not any("get_weight_norm" in vars(layer) for layer in _dora_layers(model))
