"""Mining and training on rows with several images, positives and options, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from test_every_backbone import rich

import train
from b3.config import load_config
from b3.data.datasets import load_datasets
from b3.mining.plan import BatchPlan
from scripts import mine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_data(tmp_path / "data")
    tiny.write_model(tmp_path / "model")
    rows = [rich(i) | {"neg_text": ["wrong", f"no {i}"], "neg_image_path": [[f"{i:04}.png"], []]} for i in range(48)]
    (tmp_path / "data" / "rich").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "rich" / "train-0.parquet")
    return tmp_path


def recipe(root: Path, **changes: Any) -> str:
    tree = tiny.recipe(root, output_dir=str(root / "run"))
    tree["model"]["prompt"] = "vlm2vec"
    tree["mining"] |= {"teacher": str(root / "model"), "teacher_prompt": "vlm2vec", "dir": str(root / "plans")}
    tree["data"]["datasets"] = [{"subset": "rich"}, {"subset": "pictures", "family": "vqa"}]
    tree["batch"] = {"size": 12, "policy": "b3"}
    tree["negatives"] = {"per_query": 2}
    tree["train"] |= {"steps": 2, "directions": ["qt", "qq", "tt"], "temperature": {"retrieval": 0.05, "vqa": 0.1}}
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return str(root / "recipe.yaml")


def test_mined_batches_of_pairs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each positive is a row of the plan; the teacher's part reads its vectors; all features of the loss at once."""
    file = recipe(root, train={"distill": {"weight": 0.3}, "matryoshka": [8]})
    pairs = load_datasets(load_config(file))[0]
    assert len(pairs) == 48 + sum(1 for i in range(48) if i % 3 % 2)
    assert mine.main([file]) == 0
    plan = BatchPlan.load(root / "plans" / "rich")
    rows = sorted([*plan.communities.ravel().tolist(), *plan.remainder.tolist()])
    assert rows == list(range(len(pairs)))
    capsys.readouterr()
    assert train.main([file]) == 0
    said = capsys.readouterr().out
    assert "35 negatives per query (2 hard negatives per row), and 11 by qq, 33 by tt" in said
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_closed_options_of_the_data(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"datasets": [{"subset": "rich", "closed": True}]}
    file = recipe(root, data=data, negatives={"source": "data"}, batch={"policy": "random"})
    assert train.main([file]) == 0
    assert "closed: its own options are its only negatives" in capsys.readouterr().out
    (line, _) = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["masked_columns"] == 12 * 3 - 3  # all but a row's positive and its two options


def test_a_teacher_that_cannot_read_a_row(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mine.main([recipe(root, mining={"teacher_prompt": None})]) == 2
    assert "rich row 0, positive 0: teacher: text 'which is number 0?'" in capsys.readouterr().err.splitlines()[-1]
    arrays = recipe(root, mining={"teacher": str(root / "arrays")})
    (root / "arrays").mkdir()
    assert mine.main([arrays]) == 2
    assert "mining.teacher_prompt needs mining.teacher to be a checkpoint" in capsys.readouterr().err
