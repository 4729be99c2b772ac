"""Released mined files as a plan: communities, copies, prefixes, negatives, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from b3.config import load_config
from b3.data.datasets import load_datasets, load_pairs
from b3.data.prompts import ANSWER_PREFIX
from b3.errors import DataError
from b3.mining import BatchPlan
from b3.mining.recipe import load_plan, mine_recipe
from b3.train.announce import describe
from b3.train.build import load_plans
from b3.train.sampler import build_sampler
from scripts import import_plan, mine
from scripts.import_plan import import_released, main, read_released

K, ROWS, H = 8, 61, 3
SUBSET = "OK-VQA"  # one with a prefix


def own_rows() -> dict[str, list[str]]:
    """A data set with images in queries; row 40 equals row 7; answers repeat."""
    rows: dict[str, list[str]] = {
        "qry": [f"<|image_1|>\nwhat is {i}?" for i in range(ROWS)],
        "qry_image_path": [f"images/{i}.jpg" for i in range(ROWS)],
        "pos_text": [f"answer {i % 50}" for i in range(ROWS)],
        "pos_image_path": [""] * ROWS,
    }
    for values in rows.values():
        values[40] = values[7]
    return rows


def released(own: dict[str, list[str]], seed: int = 0) -> tuple[dict[str, list[Any]], np.ndarray]:
    """(columns as the authors write them, (C, K) row numbers with the copies in the last community)."""
    order = np.random.default_rng(seed).permutation(ROWS)
    padded = np.concatenate([order, np.arange(-ROWS % K)])  # pads are copies of the first rows
    negatives = np.random.default_rng(1).integers(0, ROWS, (len(padded), H))
    columns: dict[str, list[Any]] = {name: [values[i] for i in padded] for name, values in own.items()}
    columns["pos_text"] = [ANSWER_PREFIX + text for text in columns["pos_text"]]
    columns["neg_text"] = [[ANSWER_PREFIX + own["pos_text"][j] for j in row] for row in negatives]
    columns["neg_image_path"] = [[""] * H for _ in padded]
    return columns, padded.reshape(-1, K)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / SUBSET
    folder.mkdir(parents=True)
    own = own_rows()
    pq.write_table(pa.table(own), folder / "original-00000-of-00001.parquet")
    columns, _ = released(own)
    table = pa.table(columns)
    pq.write_table(table.slice(0, 30), tmp_path / "part-0.parquet")
    pq.write_table(table.slice(30), tmp_path / "part-1.parquet")
    return tmp_path


def files(root: Path) -> list[str]:
    return [str(root / "part-0.parquet"), str(root / "part-1.parquet")]


def dataset_of(root: Path) -> Any:
    return load_pairs(f"parquet:{root / 'data'}", SUBSET, "original", image_dir=str(root))


def test_communities_copies_and_negatives(root: Path) -> None:
    dataset = dataset_of(root)
    plan = import_released(read_released(files(root)), dataset, K)
    columns, blocks = released(own_rows())
    same = {40: 7}  # equal rows may stand for each other
    alike = [sorted(same.get(int(r), int(r)) for r in block) for block in blocks[:-1]]
    assert sorted(sorted(same.get(int(r), int(r)) for r in c) for c in plan.communities) == sorted(alike)
    assert sorted([*plan.communities.ravel(), *plan.remainder]) == list(range(ROWS))
    assert len(plan.remainder) == ROWS - (len(blocks) - 1) * K
    report = plan.report
    assert (report["copies"], report["communities_dissolved"], report["rows_missing"]) == (-ROWS % K, 1, 0)
    assert (report["copies_of_other_rows"], report["negatives_not_targets"]) == (0, 0)
    assert (
        plan.hard_negatives is not None and plan.hard_negatives.shape == (ROWS, H) and (plan.hard_negatives >= 0).all()
    )
    for place, row in enumerate(blocks.ravel()[:ROWS].tolist()):
        if row in (7, 40):
            continue
        given = [dataset.target(int(j)).text for j in plan.hard_negatives[row]]
        assert given == columns["neg_text"][place]


def test_copies_are_told_from_their_originals_wherever_they_stand(root: Path) -> None:
    columns, blocks = released(own_rows())
    backwards = np.arange(blocks.size).reshape(-1, K)[::-1].ravel()  # the filled community first
    table = pa.table({name: [values[i] for i in backwards] for name, values in columns.items()})
    plan = import_released(table, dataset_of(root), K)
    assert plan.report["communities_dissolved"] == 1 and len(plan.communities) == len(blocks) - 1


def test_negatives_that_are_no_target_or_empty_are_counted(root: Path) -> None:
    columns, _ = released(own_rows())
    columns["neg_text"][0] = ["something else", "", ANSWER_PREFIX + "answer 3"]
    columns["neg_text"][1], columns["neg_image_path"][1] = [ANSWER_PREFIX + "answer 4"], [""]
    plan = import_released(pa.table(columns), dataset_of(root), K)
    assert (plan.report["negatives_not_targets"], plan.report["negatives_empty"]) == (1, 1)
    assert plan.hard_negatives is not None and (plan.hard_negatives == -1).sum() == 4


@pytest.mark.parametrize("how", ["absent", "strings", "empty"])
def test_files_with_other_negatives(root: Path, how: str) -> None:
    columns, _ = released(own_rows())
    if how == "absent":
        del columns["neg_text"], columns["neg_image_path"]
    else:
        columns["neg_text"] = [row[0] if how == "strings" else "" for row in columns["neg_text"]]
        columns["neg_image_path"] = [""] * len(columns["neg_text"])
    plan = import_released(pa.table(columns), dataset_of(root), K)
    if how == "strings":
        assert plan.hard_negatives is not None and plan.hard_negatives.shape == (ROWS, 1)
    else:
        assert plan.hard_negatives is None and plan.manifest["hard_negatives"] == 0


def test_the_command_writes_a_plan_that_training_takes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "mining" / SUBSET
    source = ["--data", f"parquet:{root / 'data'}", "--subset", SUBSET, "-k", str(K)]
    assert main([*files(root), *source, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "7 communities of 8, 5 of 61 rows left over" in printed and "192 hard negatives" in printed
    plan = BatchPlan.load(out)
    assert plan.manifest["imported"] == ["part-0.parquet", "part-1.parquet"]
    assert main([*files(root), *source, "--out", str(out)]) == 2
    data = {"source": f"parquet:{root / 'data'}", "split": "original", "image_dir": str(root)}
    data["datasets"] = [{"subset": SUBSET, "family": "vqa"}]  # type: ignore[assignment]
    changes: dict[str, Any] = {"mining": {"k": K}, "batch": {"size": 16, "policy": "b3"}, "negatives": {"per_query": 2}}
    recipe = tiny.write_recipe(root, data=data, **changes)
    config = load_config(recipe)
    datasets = load_datasets(config)
    plans = load_plans(config, datasets)
    sampler = build_sampler(config, datasets, plans)
    assert sampler.batches_per_epoch == 3
    assert "imported mined negatives" in describe(config, datasets, sampler, plans)
    assert not mine_recipe(config)[SUBSET].measured, "what was imported is not mined again"
    assert mine.main([str(recipe)]) == 0
    for override, message in (
        ("mining.k=4", "community_size was 8"),
        ("negatives.per_query=4", "hard_negatives was 3"),
    ):
        other = load_config(recipe, [override])
        with pytest.raises(Exception, match=message):
            load_plan(other, other.data.datasets[0], datasets[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("k", "64 rows are no multiple of the community size 7"),
        ("other", "1 of 64 rows are not in OK-VQA, first row 5"),
        ("lengths", "row 3: neg_text has 2 entries, neg_image_path 3"),
        ("copies", r"hold rows that occur more often than in OK-VQA"),
    ],
)
def test_rows_that_do_not_fit_are_named(root: Path, change: str, message: str) -> None:
    columns, _ = released(own_rows())
    if change == "other":
        columns["qry"][5] = "never seen"
    elif change == "lengths":
        columns["neg_text"][3] = columns["neg_text"][3][:2]
    elif change == "copies":
        columns = {name: (values[:8] * 8) for name, values in columns.items()}
    with pytest.raises(DataError, match=message):
        import_released(pa.table(columns), dataset_of(root), 7 if change == "k" else K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("absent", "does not exist"),
        ("torn", "cannot be read as parquet"),
        ("column", r"column\(s\) pos_text missing"),
        ("types", "has other columns or types than"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    root: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second = root / "part-1.parquet"
    table = pq.read_table(second)
    if change == "absent":
        second.unlink()
    elif change == "torn":
        second.write_bytes(second.read_bytes()[:-20])
    elif change == "column":
        pq.write_table(table.drop_columns(["pos_text"]), second)
    else:
        pq.write_table(table.drop_columns(["neg_text", "neg_image_path"]), second)
    arguments = ["--data", f"parquet:{root / 'data'}", "--subset", SUBSET, "-k", str(K), "--out", str(root / "plan")]
    assert import_plan.main([*files(root), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "part-1.parquet" in error
    with pytest.raises(DataError, match=message):
        read_released(files(root))
