"""The kit of atomic files, and the check of whose folder something is."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest

from b3 import files
from b3.errors import RunError
from b3.files import atomic, changes, claim, publish, wait_for, write_array, write_json, write_text

REMEDY = "choose another --out"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "old")
    with pytest.raises(TypeError), atomic(tmp_path / "deep" / "file") as stream:
        stream.writelines([b"half of the n", "ew file"])  # type: ignore[list-item]
    assert [(f.name, f.read_text()) for f in (tmp_path / "deep").iterdir()] == [("file", "old")]
    write_array(tmp_path / "array.npy", np.arange(3))
    assert np.load(tmp_path / "array.npy").tolist() == [0, 1, 2]


def test_a_folder_is_published_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "staged" / "inner").mkdir(parents=True)
    (tmp_path / "staged" / "inner" / "file").write_text("x")
    publish(tmp_path / "staged", tmp_path / "done")
    assert (tmp_path / "done" / "inner" / "file").read_text() == "x" and not (tmp_path / "staged").exists()


def test_changes_are_named_by_dotted_key() -> None:
    known = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1], "more": 0}
    assert changes(known, {"a": 1, "b": {"c": 2, "d": 3}, "e": [1], "absent": None}) == {}
    assert list(changes(known, {"b": {"c": 5}, "a": 2}).values()) == [
        "b.c was 2, now 5",
        "b.d was 3, now None",
        "a was 1, now 2",
    ]
    assert changes({"b": {"c": 2}}, {"b": None}) == {"b.c": "b.c was 2, now None"}


def test_whose_folder_is_this(tmp_path: Path) -> None:
    facts = {"model": {"name": "m", "key": "k"}, "rows": 3}
    folder = tmp_path / "out"
    assert claim(folder, facts, "index", REMEDY) is None
    write_json(folder / "manifest.json", {**facts, "seconds": 1.5})
    assert claim(folder, facts, "index", REMEDY) == {**facts, "seconds": 1.5}
    assert claim(folder, {**facts, "rows": 4}, "index", REMEDY, ignore=("rows",)) is not None
    with pytest.raises(RunError, match=r"out holds another index \(rows was 3, now 4\); choose another --out"):
        claim(folder, {**facts, "rows": 4}, "index", REMEDY)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json cannot be read .*; choose another --out"):
        claim(folder, facts, "index", REMEDY)
    (folder / "manifest.json").replace(folder / "thesis.txt")
    with pytest.raises(RunError, match=r"holds other files \(thesis\.txt\) and no index; choose another --out"):
        claim(folder, facts, "index", REMEDY)
    assert claim(folder, facts, "index", REMEDY, foreign=lambda name: name.endswith(".json")) is None
    with pytest.raises(RunError, match="is a file; choose another --out"):
        claim(folder / "thesis.txt", facts, "index", REMEDY)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """numpy by itself says how many items it has written, and nothing else."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_array(tmp_path / "array.npy", np.arange(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "array.npy"))
    assert not any(tmp_path.iterdir())


def test_a_file_of_another_rank_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([False, False, True])

    class Late(type(tmp_path)):  # type: ignore[misc]
        def exists(self, **options: bool) -> bool:
            return next(seen)

    wait_for(Late(tmp_path / "manifest.json"))
    assert not list(seen)
    monkeypatch.setattr(files, "APPEARS_SECONDS", 0.0)
    with pytest.raises(RunError, match=r"manifest\.json, which another rank has written, is not here after"):
        wait_for(tmp_path / "manifest.json")
