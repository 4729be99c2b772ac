"""Power fails at every moment of every writer: a reader then sees the old state, the new one, or a refusal."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from power import Disk

from b3 import files
from b3.data import archives, tarballs
from b3.data.index import load_index, save_index
from b3.errors import InputError
from b3.mining.plan import BatchPlan
from b3.model.cache import EmbeddingCache
from b3.train import checkpoint as checkpoints

REFUSED = "refused"


def outcomes(folder: Path, write: Callable[[], object], read: Callable[[Path], Any], mixtures: int = 4) -> list[Any]:
    """What a reader sees after a crash at each moment of a writer, and last after its end."""
    with Disk(folder) as disk:
        write()
    seen, last = [], None
    for number, (moment, tree) in enumerate(disk.crashes(mixtures=mixtures)):
        place = tree.write(folder.parent / "crashes" / str(number))
        try:
            last = read(place)
        except InputError:
            last = REFUSED
        except Exception as error:
            raise AssertionError(f"{moment}: {error!r}") from error
        seen.append(last)
    end = disk.moments[-1]
    disk.moments = [end]
    final = next(tree for moment, tree in disk.crashes(mixtures=0) if moment.endswith("synced"))
    return [*seen, read(final.write(folder.parent / "end"))]


def assert_old_or_new(seen: list[Any], old: Any, new: Any) -> None:
    strange = [one for one in seen if one not in (old, new, REFUSED)]
    assert not strange, strange[0]
    assert seen[-1] == new, "not on disk when the writer has ended"


def text_of(name: str) -> Callable[[Path], str | None]:
    return lambda folder: (folder / name).read_text() if (folder / name).exists() else None


def test_an_atomic_file_is_old_or_new(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    seen = outcomes(folder, lambda: files.write_text(folder / "file", "new one"), text_of("file"))
    assert_old_or_new(seen, "old", "new one")
    assert {"old", "new one"} <= set(seen)


def test_files_survive_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    def write() -> None:
        for name in "abc":
            files.write_text(tmp_path / "folder" / name, name)

    def read(folder: Path) -> str:
        return "".join(text_of(name)(folder) or "-" for name in "abc")

    assert set(outcomes(tmp_path / "folder", write, read)) == {"---", "a--", "ab-", "abc"}


@pytest.mark.parametrize("how", ["in place", "renamed, not synced", "synced, but not its folder"])
def test_the_model_finds_what_careless_writers_risk(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")

    def write() -> None:
        other = folder / ("file" if how == "in place" else "other")
        with other.open("w") as stream:
            stream.write("new one")
            stream.flush()
            if how.startswith("synced"):
                os.fsync(stream.fileno())
        if other.name == "other":
            other.replace(folder / "file")

    seen = outcomes(folder, write, text_of("file"))
    with pytest.raises(AssertionError):
        assert_old_or_new(seen, "old", "new one")


def whole_of(folder: Path) -> str | None:
    """What a folder of two files says, whose reader looks for `last` first."""
    if not (folder / "done" / "last").exists():
        return None
    return "".join((folder / "done" / name).read_text() for name in ("inner/part", "last"))


def staged(folder: Path) -> Path:
    place = folder / ".staged"
    (place / "inner").mkdir(parents=True)
    for name in ("inner/part", "last"):
        (place / name).write_text("new")
    return place


@pytest.mark.parametrize("old", [None, "oldold"])
@pytest.mark.parametrize("move", ["publish", "move_in"])
def test_a_published_folder_is_whole(tmp_path: Path, old: str | None, move: str) -> None:
    folder = tmp_path / "folder"
    if old:
        (folder / "done" / "inner").mkdir(parents=True)
        for name in ("inner/part", "last"):
            (folder / "done" / name).write_text("old")

    def write() -> None:
        if move == "publish":
            files.publish(staged(folder), folder / "done")
        else:
            (folder / "done").mkdir(parents=True, exist_ok=True)
            files.sync(folder)
            files.move_in(staged(folder), folder / "done", "last")

    seen = outcomes(folder, write, whole_of)
    assert_old_or_new([one if one is not None else REFUSED for one in seen], old or REFUSED, "newnew")


def plan_of(seed: int) -> BatchPlan:
    rows = np.random.default_rng(seed).permutation(8)
    return BatchPlan(rows[:6].reshape(3, 2), rows[6:], None, {"n": 8}, {"N": 8, "seed": 0})


@pytest.mark.parametrize("again", [False, True], ids=["a new plan", "over an old one"])
def test_a_plan_is_old_new_or_refused(tmp_path: Path, again: bool) -> None:
    folder = tmp_path / "folder"
    old, new = plan_of(1), plan_of(2)
    if again:
        old.save(folder / "plan")

    def read(place: Path) -> list[list[int]] | str:
        return BatchPlan.load(place / "plan").communities.tolist()

    seen = outcomes(folder, lambda: new.save(folder / "plan"), read)
    assert_old_or_new(seen, old.communities.tolist() if again else REFUSED, new.communities.tolist())


def test_an_index_is_never_of_two_models(tmp_path: Path) -> None:
    """A run that was killed before its manifest has left another model's vectors."""
    folder = tmp_path / "folder"
    data: Any = SimpleNamespace(shown=[{"id": n, "text": "a", "image": None} for n in range(3)])
    manifest = {"kind": "b3 embeddings", "options": {}, "input": {}}
    save_index(folder / "index", np.ones((3, 2), np.float32), data, manifest)
    (folder / "index" / "manifest.json").unlink()

    def read(place: Path) -> float | str:
        load_index(place / "index")
        return float(np.load(place / "index" / "embeddings.npy").sum())

    seen = outcomes(folder, lambda: save_index(folder / "index", np.zeros((3, 2), np.float32), data, manifest), read)
    assert_old_or_new(seen, REFUSED, 0.0)


def test_a_cache_holds_what_was_encoded_or_nothing(tmp_path: Path) -> None:
    digests = np.repeat(np.arange(4, dtype=np.uint8)[:, None], 32, axis=1)
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2) + 1

    def write() -> None:
        cache = EmbeddingCache(tmp_path / "folder", {"model": "m"})
        cache.lookup(digests, b"t" * 16, np.empty_like(vectors))
        for part in (slice(0, 2), slice(2, 4)):
            cache.remember(digests[part], b"t" * 16, vectors[part], write=True)
            cache.flush()

    def read(place: Path) -> int:
        found = np.zeros_like(vectors)
        known, _ = EmbeddingCache(place, {"model": "m"}).lookup(digests, b"t" * 16, found)
        assert np.array_equal(found[known], vectors[known])
        return int(known.sum())

    seen = outcomes(tmp_path / "folder", write, read)
    assert set(seen) == {0, 2, 4}
    assert seen[-1] == 4


def test_a_checkpoint_is_whole_and_so_is_the_log_before_it(tmp_path: Path) -> None:
    run = tmp_path / "folder"
    run.mkdir()

    def write() -> None:
        for step in (1, 2, 3):
            checkpoints.append_log(run / "metrics.jsonl", {"step": step})
            files.sync(run / "metrics.jsonl")
            place = checkpoints.stage(run)
            (place / "weights").write_text(f"weights of step {step}")
            checkpoints.publish(place, run, {"step": step})
            checkpoints.prune(run, 1)

    def read(place: Path) -> int:
        newest = checkpoints.newest_checkpoint(place)
        if newest is None:
            return 0
        step = checkpoints.checkpoint_step(newest)
        assert (newest / "weights").read_text() == f"weights of step {step}"
        assert [line["step"] for line in checkpoints.read_log(place / "metrics.jsonl")][:step] == [*range(1, step + 1)]
        return step

    seen = outcomes(run, write, read)
    assert set(seen) == {0, 1, 2, 3}
    assert seen == sorted(seen), "a later crash leaves an earlier checkpoint"


CONTENT = {f"images/{n}.png": bytes([n + 1]) * 50 for n in range(4)}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT if (folder / name).exists()}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_is_continued_is_whole(tmp_path: Path, kind: str) -> None:
    archive, folder = tmp_path / f"images.{kind}", tmp_path / "folder"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for name, data in CONTENT.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(archive, "w") as tar:
            for name, data in CONTENT.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    file = archives.RemoteFile("images.zip", archive.stat().st_size)

    def extract(out: Path) -> None:
        if kind == "zip":
            archives.extract(archive, out, file, set(CONTENT), None)
        else:
            tarballs.extract([archive], out, lambda name: name)

    def read(place: Path) -> bool:
        if not archives.marked(place, file, None):
            extract(place)
        return contents(place) == CONTENT

    assert set(outcomes(folder, lambda: extract(folder), read)) == {True}
