"""Plans on disk: complete, verified, never mixed up."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from mining import reference

from b3.errors import InputError
from b3.mining import BatchPlan, mine
from b3.mining.plan import FILES


@pytest.fixture(scope="module")
def plan() -> BatchPlan:
    queries, targets = reference.clustered(50)
    options = {"p": 2, "m": 10, "community_size": 8, "hard_negatives": 2}
    return mine(queries, targets, **options, data_fingerprint="abc", teacher="toy")  # type: ignore[arg-type]


def test_save_and_load_round_trip(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "a" / "plan")
    folder = tmp_path / "a" / "plan"
    assert {f.name for f in folder.iterdir()} == set(FILES)
    assert [f.name for f in folder.parent.iterdir()] == ["plan"], "no temporary folder stays"
    loaded = BatchPlan.load(folder, "abc")
    for name in ("communities", "remainder", "hard_negatives"):
        assert np.array_equal(getattr(loaded, name), getattr(plan, name))
    assert loaded.report == plan.report
    assert plan.manifest.items() <= loaded.manifest.items()
    wanted = {
        "p": 2,
        "m": 10,
        "community_size": 8,
        "hard_negatives": 2,
        "edges": "union",
        "veto": True,
        "partitioner": "anneal",
        "seed": 0,
    }
    assert wanted.items() <= loaded.manifest.items()
    assert "mined" in (folder / "report.html").read_text()


def test_a_plan_without_hard_negatives(tmp_path: Path, plan: BatchPlan) -> None:
    dataclasses.replace(plan, hard_negatives=None).save(tmp_path / "plan")
    assert not (tmp_path / "plan" / "hard_negatives.npy").exists()
    assert BatchPlan.load(tmp_path / "plan").hard_negatives is None


@pytest.mark.parametrize("name", ["communities.npy", "remainder.npy", "hard_negatives.npy"])
@pytest.mark.parametrize("damage", ["edit", "cut", "remove"])
def test_damaged_arrays_are_refused(plan: BatchPlan, tmp_path: Path, name: str, damage: str) -> None:
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / name
    content = bytearray(file.read_bytes())
    if damage == "edit":
        content[-3] ^= 1
    file.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(InputError, match=name):
        BatchPlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json is not a file of a batch plan"),
        ('{"format_version": 99, "sha256": {}}', "plan format 99, this version reads 2"),
        ('{"format_version": 2, "sha256": {}}', "lists no communities.npy"),
        (None, "no complete batch plan"),
    ],
)
def test_bad_manifests_are_refused(plan: BatchPlan, tmp_path: Path, content: str | None, message: str) -> None:
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / "manifest.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(InputError, match=message):
        BatchPlan.load(tmp_path / "plan")


def test_a_torn_report_is_refused(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / "report.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(InputError, match=r"report\.json cannot be read"):
        BatchPlan.load(tmp_path / "plan")


def test_load_compares_the_fingerprint_or_any_entries(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    with pytest.raises(InputError, match="data_fingerprint was 'abc', now 'xyz'"):
        BatchPlan.load(tmp_path / "plan", "xyz")
    BatchPlan.load(tmp_path / "plan", {"p": 2, "teacher": "toy"})
    with pytest.raises(InputError, match="p was 2, now 3; community_size was 8, now 9"):
        BatchPlan.load(tmp_path / "plan", {"p": 3, "community_size": 9})


def test_another_plan_is_not_overwritten_unasked(plan: BatchPlan, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    plan.save(folder)
    plan.save(folder)  # the same again is no harm
    other = dataclasses.replace(plan, manifest={**plan.manifest, "seed": 1}, hard_negatives=None)
    with pytest.raises(InputError, match=r"seed was 0, now 1.*choose another folder or delete it"):
        other.save(folder)
    assert BatchPlan.load(folder).manifest["seed"] == 0


def test_a_folder_that_is_no_plan_is_left_alone(plan: BatchPlan, tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    plan.save(tmp_path / "plan")  # empty: fine
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds other files .thesis\.txt. and no batch plan"):
        plan.save(tmp_path / "work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; choose another folder"):
        plan.save(tmp_path / "file")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", range(8))
def test_a_save_cut_off_anywhere_leaves_no_mixture(
    plan: BatchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, existing: bool
) -> None:
    folder = tmp_path / "plan"
    other = dataclasses.replace(plan, communities=plan.communities[::-1])
    if existing:
        plan.save(folder)
    calls = 0
    original = os.replace

    def cut(source: str, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr("b3.files.os.replace", cut)
    try:
        other.save(folder)
    except KeyboardInterrupt:
        with pytest.raises(InputError, match="no complete batch plan"):
            BatchPlan.load(folder)
    else:
        assert step >= len(FILES)
    monkeypatch.undo()
    dataclasses.replace(other, hard_negatives=None).save(folder)  # and the next save repairs it
    loaded = BatchPlan.load(folder)
    assert np.array_equal(loaded.communities, other.communities) and loaded.hard_negatives is None
    assert {file.name for file in folder.iterdir()} == set(FILES) - {"hard_negatives.npy"}
    assert [f.name for f in tmp_path.iterdir()] == ["plan"]
