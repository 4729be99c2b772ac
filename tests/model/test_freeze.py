"""What is trained, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_data import checkpoint

from b3 import Embedder
from b3.errors import InputError
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.checkpoint import freeze_matching, unfreeze_all

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def backbone(folder: Path) -> torch.nn.Module:
    return Embedder.from_pretrained(folder, dtype="bfloat16", device="cpu").backbone


def trained(backbone: torch.nn.Module) -> set[str]:
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def test_full_training_takes_everything_in_float32(backbone: torch.nn.Module) -> None:
    tied = backbone.lm_head.weight is backbone.model.language_model.embed_tokens.weight
    unfreeze_all(backbone)
    names = {name for name, _ in backbone.named_parameters()}
    assert trained(backbone) == (names if tied else names - {"lm_head.weight"})
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_a_head_of_its_own_stays_frozen(backbone: torch.nn.Module) -> None:
    backbone.lm_head.weight = torch.nn.Parameter(backbone.lm_head.weight.detach().clone())
    unfreeze_all(backbone)
    assert "lm_head.weight" not in trained(backbone)


def test_patterns_freeze_what_they_find(backbone: torch.nn.Module) -> None:
    unfreeze_all(backbone)
    before = trained(backbone)
    frozen = freeze_matching(backbone, [r"^model\.visual\.", r"embed_tokens", r"layers\.0\."])
    expected = {n for n in before if n.startswith("model.visual.") or "embed_tokens" in n or "layers.0." in n}
    assert set(frozen) == expected and trained(backbone) == before - expected


def test_an_adapter_can_be_frozen_in_part(backbone: torch.nn.Module) -> None:
    wrapped = attach_adapter(backbone, AdapterSpec(r=2))
    freeze_matching(wrapped, [r"layers\.0\."])
    assert trained(wrapped) and all("layers.0." not in name and "lora" in name for name in trained(wrapped))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(["visuel"], "'visuel' matches none"), (["("], "not a regular expression"), ([""], "leaves none")],
)
def test_a_pattern_that_cannot_be_meant(backbone: torch.nn.Module, patterns: list[str], message: str) -> None:
    unfreeze_all(backbone)
    before = trained(backbone)
    with pytest.raises(InputError, match=message):
        freeze_matching(backbone, patterns)
    assert trained(backbone) == before
