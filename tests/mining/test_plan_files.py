"""A plan's folder: round trips, damage, plans of something else, folders that cannot be written."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from b3.errors import InputError
from b3.mining import BatchPlan, mine

NOBODY = 65534


def toy(**change: Any) -> BatchPlan:
    rng = np.random.default_rng(7)
    points = rng.normal(size=(45, 8))
    noisy = points + 0.5 * rng.normal(size=points.shape)
    options = {"p": 2, "m": 9, "community_size": 8, "hard_negatives": 3, "data_fingerprint": "rows-1", "teacher": "t"}
    return mine(noisy, points, **options | change)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan() -> BatchPlan:
    return toy()


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def equal(a: BatchPlan, b: BatchPlan) -> bool:
    arrays = ("communities", "remainder", "hard_negatives")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays) and a.report == b.report


def test_round_trip_twice_is_byte_for_byte(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(str(tmp_path / "first"))
    loaded = BatchPlan.load(str(tmp_path / "first"))
    assert equal(plan, loaded)
    assert {array.dtype for array in (loaded.communities, loaded.remainder, loaded.hard_negatives)} == {
        np.dtype(np.int64)
    }  # type: ignore[union-attr]
    loaded.save(tmp_path / "second")
    assert read(tmp_path / "first") == read(tmp_path / "second")
    assert equal(plan, BatchPlan.load(tmp_path / "second"))


@pytest.mark.parametrize("change", [{"community_size": 9}, {"community_size": 45}, {"community_size": 1}])
def test_shapes_with_empty_parts_survive(change: dict[str, int], tmp_path: Path) -> None:
    plan = toy(**change)
    assert plan.remainder.shape == (0,)
    plan.save(tmp_path / "plan")
    loaded = BatchPlan.load(tmp_path / "plan")
    assert equal(plan, loaded) and loaded.remainder.shape == (0,)


def test_files_follow_the_umask(plan: BatchPlan, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        plan.save(tmp_path / "plan")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plan").stat().st_mode) == 0o750
    for name in ("communities.npy", "report.json", "report.html", "manifest.json"):
        assert stat.S_IMODE((tmp_path / "plan" / name).stat().st_mode) == 0o640, name


@pytest.mark.parametrize("name", ["communities.npy", "remainder.npy", "hard_negatives.npy"])
@pytest.mark.parametrize("place", ["header", "middle", "end", "grown", "empty"])
def test_checksum_mismatch(plan: BatchPlan, tmp_path: Path, name: str, place: str) -> None:
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / name
    content = bytearray(file.read_bytes())
    if place in ("header", "middle", "end"):
        content[{"header": 0, "middle": len(content) // 2, "end": -1}[place]] ^= 1
    file.write_bytes(content + b"\0" if place == "grown" else b"" if place == "empty" else content)
    with pytest.raises(InputError, match=rf"{name} differs from its checksum in manifest\.json.*mine the plan again"):
        BatchPlan.load(tmp_path / "plan")


def test_arrays_of_another_plan_are_refused(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    toy(seed=1).save(tmp_path / "other")
    (tmp_path / "other" / "communities.npy").replace(tmp_path / "plan" / "communities.npy")
    with pytest.raises(InputError, match=r"communities\.npy differs from its checksum"):
        BatchPlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("communities.npy", r"communities\.npy is missing"),
        ("remainder.npy", r"remainder\.npy is missing"),
        ("hard_negatives.npy", r"hard_negatives\.npy is missing"),
        ("report.json", r"report\.json cannot be read"),
        ("manifest.json", r"no complete batch plan \(no manifest\.json\)"),
    ],
)
def test_missing_file(plan: BatchPlan, tmp_path: Path, name: str, message: str) -> None:
    plan.save(tmp_path / "plan")
    (tmp_path / "plan" / name).unlink()
    with pytest.raises(InputError, match=message) as caught:
        BatchPlan.load(tmp_path / "plan")
    assert str(tmp_path / "plan") in str(caught.value) and "\n" not in str(caught.value)
    plan.save(tmp_path / "plan")  # mining again repairs it
    assert equal(plan, BatchPlan.load(tmp_path / "plan"))


def test_no_folder_at_all_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "absent", tmp_path / "file", tmp_path):
        with pytest.raises(InputError, match="no complete batch plan"):
            BatchPlan.load(folder)


@pytest.mark.parametrize("kept", [0, 1, 0.1, 0.5, 0.9, -2, "binary", "null"])
def test_torn_manifest(plan: BatchPlan, tmp_path: Path, kept: float | str) -> None:
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / "manifest.json"
    content = file.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    torn = {"binary": b"\xff\xfe\0", "null": b"null"}.get(str(kept))
    file.write_bytes(content[:length] if torn is None else torn)  # type: ignore[misc]
    with pytest.raises(InputError, match=r"manifest\.json (cannot be read|is not a file of a batch plan)") as caught:
        BatchPlan.load(tmp_path / "plan")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"manifest\.json"):
        plan.save(tmp_path / "plan")  # what it holds is not known, so it is not replaced unasked


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_unknown_format_version(plan: BatchPlan, tmp_path: Path, version: Any) -> None:
    plan.save(tmp_path / "plan")
    file = tmp_path / "plan" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["format_version"] == 2
    file.write_text(json.dumps({**manifest, "format_version": version}))
    with pytest.raises(InputError, match=re.escape(f"plan format {version!r}, this version reads 2")):
        BatchPlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"p": 3}, "p was 2, now 3"),
        ({"m": 8}, "m was 9, now 8"),
        ({"community_size": 5}, "community_size was 8, now 5"),
        ({"hard_negatives": 0}, "hard_negatives was 3, now 0"),
        ({"edges": "mutual"}, "edges was 'union', now 'mutual'"),
        ({"veto": False}, "veto was True, now False"),
        ({"partitioner": "random"}, "partitioner was 'anneal', now 'random'"),
        ({"refine_passes": 1}, "refine_passes was 30, now 1"),
        ({"teacher": "u"}, "teacher was 't', now 'u'"),
        ({"data_fingerprint": "rows-2"}, "data_fingerprint was 'rows-1', now 'rows-2'"),
    ],
)
def test_another_plan_is_not_replaced(plan: BatchPlan, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    folder = tmp_path / "plan"
    plan.save(folder)
    before, other = read(folder), toy(**change)
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        other.save(folder)
    assert "delete it" in str(caught.value) and str(folder) in str(caught.value)
    assert read(folder) == before and [f.name for f in tmp_path.iterdir()] == ["plan"]


def test_the_same_plan_is_saved_again_unasked(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    again = toy()
    again.save(tmp_path / "plan")
    assert equal(again, BatchPlan.load(tmp_path / "plan"))


def test_expect_fingerprint_names_what_differs(plan: BatchPlan, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    plan.save(folder)
    assert equal(plan, BatchPlan.load(folder, "rows-1"))
    assert equal(
        plan, BatchPlan.load(folder, {"data_fingerprint": "rows-1", "N": 45, "community_size": 8, "veto": True})
    )
    assert equal(plan, BatchPlan.load(folder, {}))
    with pytest.raises(InputError, match=r"was 'rows-1', now 'rows-2'.*mine it again") as caught:
        BatchPlan.load(folder, "rows-2")
    assert str(folder) in str(caught.value)
    with pytest.raises(InputError, match=r"\(seed was 0, now 4; no_such_key was None, now 'x'\)"):
        BatchPlan.load(folder, {"seed": 4, "p": 2, "no_such_key": "x"})
    toy(data_fingerprint=None).save(tmp_path / "unknown")
    with pytest.raises(InputError, match="data_fingerprint was None, now 'rows-1'"):
        BatchPlan.load(tmp_path / "unknown", "rows-1")


def test_a_fingerprint_is_checked_before_large_arrays_are_read(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    (tmp_path / "plan" / "communities.npy").unlink()
    with pytest.raises(InputError, match="data_fingerprint"):
        BatchPlan.load(tmp_path / "plan", "rows-2")


def test_the_page_is_written_and_self_contained(tmp_path: Path) -> None:
    plan = toy(teacher="<b>teacher & co</b>")
    plan.save(tmp_path / "plan")
    page = (tmp_path / "plan" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert f"{plan.report['mined_negatives_per_query']:.2f}" in page and "45 rows" in page
    assert "<b>teacher" not in page and "&lt;b&gt;teacher &amp; co" in page
    links = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    links += re.findall(r"url\(\s*[\"']?([^)\"']+)", page)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import", page, re.IGNORECASE)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, addresses


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder that this process cannot write to; root gives up its rights for the time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "locked"
        folder.mkdir()
        root = os.geteuid() == 0
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        if root:
            os.seteuid(NOBODY)
        try:
            if os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                pytest.skip("permissions are not enforced here")
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_read_only_parent_raises_oserror(plan: BatchPlan) -> None:
    with read_only() as folder:
        for target in (folder / "plan", folder / "runs" / "plan"):
            with pytest.raises(PermissionError) as caught:  # an OSError, not an InputError
                plan.save(target)
            assert not isinstance(caught.value, InputError) and str(folder) in str(caught.value)
        assert list(folder.iterdir()) == []


def test_a_parent_that_is_a_file_raises_oserror(plan: BatchPlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        plan.save(tmp_path / "file" / "plan")
    assert (tmp_path / "file").read_text() == "x"


def test_a_report_that_is_no_json_leaves_nothing_behind(plan: BatchPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    before = read(tmp_path / "plan")
    broken = replace(plan, report={**plan.report, "extra": float("nan")})
    for folder in ("plan", "fresh"):
        with pytest.raises(ValueError, match="JSON"):
            broken.save(tmp_path / folder)
    assert read(tmp_path / "plan") == before and [f.name for f in tmp_path.iterdir()] == ["plan"]
