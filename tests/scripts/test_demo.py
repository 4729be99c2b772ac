"""The demo's own parts: its student, its arms, and the intervals under its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from b3 import Embedder
from b3.config import load_config
from b3.data.datasets import load_eval
from b3.eval.run import evaluate_subset
from b3.model.encode import Encoder
from scripts import demo


def test_the_student_fits_into_the_package() -> None:
    files = [file for file in demo.STUDENT.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8 * 2**20
    with safe_open(demo.STUDENT / "model.safetensors", "numpy") as weights:
        assert all(weights.get_slice(key).get_dtype() == "BF16" for key in list(weights.keys()))
    card = (demo.STUDENT / "README.md").read_text()
    assert all(word in card for word in ("openclipart", "tuxpaint", "game-icons", "CC-BY", "GPL", "bfloat16"))


def test_the_student_knows_drawings_before_training() -> None:
    config = load_config(demo.RECIPE)
    assert config.eval is not None
    data = load_eval(config.eval.source, "emoji_vg", config.eval.split)
    model = Embedder.from_pretrained(str(demo.STUDENT), dtype="float32", **config.model.settings())
    assert evaluate_subset(data, Encoder(model)).precision > 0.15  # 0.05 by chance


def test_arms_differ_from_the_control_in_their_batches_alone() -> None:
    dumps = {}
    for arm, keys in demo.ARMS.items():
        tree = load_config(demo.RECIPE, list(keys)).model_dump()
        del tree["batch"]["policy"], tree["batch"]["random_steps"], tree["negatives"]
        dumps[arm] = json.dumps(tree, sort_keys=True)
    assert set(dumps) == {"random", "b3", "b3x"} and len(set(dumps.values())) == 1


def test_the_interval_is_that_of_paired_rows() -> None:
    rng = np.random.default_rng(3)
    control = [(rng.random(n) < 0.4).astype(float) for n in (300, 200)]
    arm = [np.where(rng.random(len(rows)) < 0.2, 1.0, rows) for rows in control]  # right where the control is, or more
    mean, low, high = demo.gap(arm, control)
    assert mean == pytest.approx(np.mean([own.mean() - other.mean() for own, other in zip(arm, control, strict=True)]))
    variance = sum((a - c).var() / len(a) for a, c in zip(arm, control, strict=True)) / 4  # of a mean of two means
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.1)
    assert demo.gap(arm, arm) == [0.0, 0.0, 0.0]


def test_right_rows_are_those_that_an_evaluation_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    config = load_config(demo.RECIPE, ["eval.subsets=[emoji_vg]"])
    result = demo.evaluate(config, "pretrained", str(demo.STUDENT))
    (rows,) = demo.right_rows(config, "pretrained")
    assert rows.mean() == pytest.approx(result["subsets"]["emoji_vg"]) and 0 < rows.mean() < 1
