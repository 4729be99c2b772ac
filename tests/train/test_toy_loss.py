"""A loss from outside the package is one file and one line, and a recipe names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from b3 import registry
from b3.config import load_config
from b3.errors import ConfigError
from b3.train.run import train


def test_a_recipe_trains_with_a_loss_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.LOSSES, "distance", "toy_loss:Distance")
    tiny.write_data(tmp_path / "data")
    tiny.write_text_model(tmp_path / "model")
    changes = {"data": {"datasets": [{"subset": "words"}]}, "train": {"loss": "distance", "steps": 3, "lr": 1e-2}}
    result = train(load_config(tiny.write_recipe(tmp_path, **changes)))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(1 - lines[0]["positive_similarity"], abs=1e-6)
    assert lines[2]["loss"] < lines[0]["loss"]
    learned = load_file(result.folder / "checkpoint-3" / "loss.safetensors")
    assert learned["weight"].item() < 1.0
    assert "exp_avg/loss.weight" in load_file(result.folder / "checkpoint-3" / "optimizer.safetensors")


def test_an_unknown_loss_lists_those_there_are(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path)
    with pytest.raises(ConfigError, match="there is no loss 'nce'; choose from info_nce"):
        load_config(recipe, ["train.loss=nce"])
