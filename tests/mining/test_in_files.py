"""Arrays that lie in files: the same plans, whatever lies where; a disk without room; kept stages that are damaged."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining import reference

from b3 import memory
from b3.files import Stages
from b3.mining import mine
from b3.mining.plan import ARRAYS

BY_LABEL = {"classification": True, "preset": "paper"}


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All arrays that may lie in files do; the sizes of those that were made."""
    sizes: list[int] = []
    reserve = os.posix_fallocate

    def noted(handle: int, start: int, size: int) -> None:
        sizes.append(size)
        reserve(handle, start, size)

    monkeypatch.setattr(memory, "most_in_memory", lambda: 0)
    monkeypatch.setattr(os, "posix_fallocate", noted)
    return sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"piece_rows": 64},
        {"partitioner": "kmeans"},
        {"edges": "mutual"},
        {"classification": True, "preset": "paper"},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", [None, 25])
def test_plans_are_those_of_arrays_in_memory(options: dict[str, Any], labels: int | None, mapped: list[int]) -> None:
    if options.get("preset"):
        pytest.importorskip("pymetis")
    queries, targets = reference.clustered(203, labels=labels)
    values = {"p": 3, "m": 10, "community_size": 8, "hard_negatives": 2, **options}
    in_files = mine(queries, targets, **values)
    assert max(mapped) >= queries.size * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "most_in_memory", lambda: 1 << 40)
        count = len(mapped)
        in_memory = mine(queries, targets, **values)
    assert len(mapped) == count
    for name in ARRAYS:
        assert np.array_equal(getattr(in_files, name), getattr(in_memory, name)), name


def test_stages_are_read_into_files(tmp_path: Path, mapped: list[int]) -> None:
    stages = Stages(tmp_path)
    arrays = {
        "order": np.arange(12, dtype=np.int32).reshape(3, 4),
        "across": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "none": np.empty((0, 3)),
        "facts": np.asarray('{"a": 1}'),
    }
    stages.save("rankings", "key", arrays)
    found = stages.load("rankings", "key")
    assert found is not None
    assert 48 in mapped
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_damaged_stage_is_none(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    order = np.arange(1000, dtype=np.int32)
    stages.save("rankings", "key", {"order": order})
    content = bytearray((tmp_path / "rankings.npz").read_bytes())
    content[content.index(order.tobytes()) + 17] ^= 1
    (tmp_path / "rankings.npz").write_bytes(content)
    assert stages.load("rankings", "key") is None


def test_an_array_that_its_header_overstates_is_none(tmp_path: Path) -> None:
    order, key = io.BytesIO(), io.BytesIO()
    np.save(order, np.arange(1000, dtype=np.int32))
    np.save(key, np.asarray("key"))
    with zipfile.ZipFile(tmp_path / "rankings.npz", "w") as archive:  # whose checksums are right
        archive.writestr("key.npy", key.getvalue())
        archive.writestr("order.npy", order.getvalue().replace(b"(1000,)", b"(1001,)"))
    assert Stages(tmp_path).load("rankings", "key") is None


def test_without_room_on_the_disk_arrays_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memory, "most_in_memory", lambda: 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    array = memory.room_for((3, 4), np.int32)
    assert (array.shape, array.dtype) == ((3, 4), np.int32)


def test_an_array_may_take_a_sixteenth_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 32 << 30)
    memory.most_in_memory.cache_clear()
    assert memory.most_in_memory() == 2 << 30
    memory.most_in_memory.cache_clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.most_in_memory() == 1 << 29
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 20)
    memory.most_in_memory.cache_clear()
    assert memory.most_in_memory() == memory.MIN_MAPPED
    memory.most_in_memory.cache_clear()
