"""What workers read ahead is bounded, is asked for before the first step, and takes nothing of /dev/shm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from b3.errors import DataError, RunError
from b3.model.workers import TASKS_AHEAD, run_ahead
from b3.train import room
from b3.train.room import check_room, free_memory, local_ranks

GIB = 2**30


def test_too_many_workers_are_refused_with_a_number_that_fits() -> None:
    need = 2 * GIB * TASKS_AHEAD * 4 * 8
    check_room(2 * GIB, workers=4, ranks=8, free=need)
    with pytest.raises(RunError, match=r"take 192.0 GiB of memory .* 191.0 GiB are free; set train.workers to 3 or"):
        check_room(2 * GIB, workers=4, ranks=8, free=need - GIB)
    check_room(2 * GIB, workers=3, ranks=8, free=need - GIB)
    check_room(2 * GIB, workers=4, ranks=8, free=None)


class Collator:
    """Inputs of a GiB for each row."""

    problem: DataError | None = None

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, rows: list[tuple[int, int]]) -> SimpleNamespace:
        self.calls.append(len(rows))
        if self.problem is not None:
            raise self.problem
        return SimpleNamespace(nbytes=len(rows) * GIB)


def test_a_sample_stands_for_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: Any = [[(0, row) for row in range(20)], [(0, 99)]]
    for name in ("WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(room, "free_memory", lambda: 60 * GIB)
    collator: Any = Collator()
    room.check_first_batch(collator, batches, workers=1)  # 20 GiB, three times
    assert collator.calls == [room.SAMPLE_ROWS]
    with pytest.raises(RunError, match=r"take 120.0 GiB of memory \(20.0 GiB each"):
        room.check_first_batch(collator, batches, workers=2)
    room.check_first_batch(collator, batches, workers=0)
    room.check_first_batch(collator, [], workers=2)
    assert len(collator.calls) == 2
    collator.problem = DataError("row 3 is broken")
    room.check_first_batch(collator, batches, workers=2)  # said when the batch is read


def test_free_memory_is_that_of_the_machine() -> None:
    free = free_memory()
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert free is not None and 0 < free <= 1024 * int(total.split()[1])


def test_ranks_of_this_machine_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert local_ranks() == 1
    for name, value in zip(names, ("16", "8", "4"), strict=True):
        monkeypatch.setenv(name, value)
        assert local_ranks() == int(value)


def ones(number: int) -> torch.Tensor:
    return torch.full((4 << 20,), float(number))


def test_batches_travel_outside_of_shared_memory() -> None:
    """16 MiB each; a container has 64 MiB in /dev/shm, and a tensor that lies there is mapped by who receives it."""
    before = {file.name for file in Path("/dev/shm").iterdir()}
    tensors = []
    for tensor in run_ahead(ones, range(6), workers=1):
        tensors.append(tensor)
        assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text()  # semaphores of others may lie there
        assert not {name for name in {f.name for f in Path("/dev/shm").iterdir()} - before if name.startswith("torch")}
    assert [float(tensor[0]) for tensor in tensors] == [0, 1, 2, 3, 4, 5]
