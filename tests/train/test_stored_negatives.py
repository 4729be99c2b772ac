"""Hard negatives that the rows bring along: the loss sees them, a missing one is masked, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from forks import Job

from b3 import Embedder
from b3.config import load_config
from b3.data.datasets import load_pairs
from b3.errors import ConfigError, RunError
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE
from b3.train.run import train
from b3.train.step import CachedStep

WRONG = ["wrong 0", "worse 0"], ["wrong 1"], [], ["wrong 3", "worse 3"], ["", "worse 4"], ["pos 5"]


def write(folder: Path, negatives: bool = True) -> None:
    rows: list[dict[str, Any]] = []
    for i, texts in enumerate(WRONG):
        row: dict[str, Any] = {"qry": f"query {i}", "qry_image_path": "", "pos_text": f"pos {i}", "pos_image_path": ""}
        if negatives:
            row |= {"neg_text": texts, "neg_image_path": [""] * len(texts)}
        rows.append(row)
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path)
    tiny.write_text_model(tmp_path / "model", "bert")
    return tmp_path


def recipe(root: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "name": "own",
        "output_dir": str(root / "run"),
        "model": {"name": str(root / "model"), "train": "full", "dtype": "float32"},
        "data": {"source": f"jsonl:{root}/own.jsonl", "prefix_targets": False, "datasets": [{"subset": "own"}]},
        "mining": {"dir": str(root / "plans"), "teacher": str(root / "model")},
        "negatives": {"per_query": 2, "source": "data"},
        "batch": {"size": 6, "policy": "random"},
        "train": {"steps": 1, "lr": 1e-3},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root / "recipe.yaml"


def test_the_loss_is_that_of_a_plain_table(root: Path) -> None:
    model = Embedder.from_pretrained(root / "model", dtype="float32")
    data = load_pairs(f"jsonl:{root}/own.jsonl", "own", prefix_targets=False)
    inputs = StepCollator([data], model.processor, 30, stored_negatives=2)([(0, i) for i in range(6)])
    result = CachedStep(model.requires_grad_(True), InfoNCE(0.1, mask_duplicates=True))(inputs, 0)

    def vectors(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(model.encode(texts)).double()

    negatives = [text for texts in WRONG for text in texts if text]
    scores = vectors([f"query {i}" for i in range(6)]) @ vectors([f"pos {i}" for i in range(6)] + negatives).T / 0.1
    scores[5, 6 + negatives.index("pos 5")] = -torch.inf  # equal to the positive
    expected = -torch.log_softmax(scores, dim=1)[range(6), range(6)].mean()
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_run_needs_no_plan_and_says_how_many(root: Path) -> None:
    job = Job(root / "logs", str(recipe(root)))
    assert job.wait() == [0], job.text()
    assert "17 negatives per query (2 hard negatives per row)" in job.text()
    assert not (root / "plans").exists()


def test_rows_without_negatives_are_refused(root: Path) -> None:
    write(root, negatives=False)
    with pytest.raises(RunError, match="own has no columns neg_text and neg_image_path"):
        train(load_config(recipe(root)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": {"per_query": 0}}, "needs negatives.per_query"),
        ({"train": {"mask_teacher_margin": 0.1}}, "negatives.source data brings; leave one out"),
    ],
)
def test_what_does_not_go_together(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(root, **changes))
