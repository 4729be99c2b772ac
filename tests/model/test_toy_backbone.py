"""A backbone from outside the package is one file and one line: loaded by its model_type, and trained by a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from toy_backbone import Toy

from b3 import Embedder, registry
from b3.config import load_config
from b3.errors import InputError
from b3.train.run import train


def test_a_recipe_trains_a_backbone_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKBONES, "toy", "toy_backbone:Toy")
    tiny.write_data(tmp_path / "data")
    Toy.tiny(tmp_path / "model", [])
    before = Embedder.from_pretrained(tmp_path / "model")
    assert isinstance(before, Toy)
    changes = {
        "model": {"train": "full"},
        "data": {"datasets": [{"subset": "words"}]},
        "train": {"steps": 24, "lr": 1e-3},
    }
    result = train(load_config(tiny.write_recipe(tmp_path, **changes)))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert sum(losses[16:]) < 0.9 * sum(losses[:8]), "the third epoch is better than the first"
    after = Embedder.from_pretrained(result.folder)
    assert np.abs(after.encode(["a red disc"]) - before.encode(["a red disc"])).max() > 1e-3


def test_an_unknown_architecture_lists_those_there_are(tmp_path: Path) -> None:
    Toy.tiny(tmp_path / "model", [])
    with pytest.raises(InputError, match="model_type 'toy'; supported: qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Embedder.from_pretrained(tmp_path / "model")
