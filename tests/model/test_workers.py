"""Workers: results in order, errors as they were raised, no fork of threads, no hang, nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from processes import run_python

from b3.errors import DataError, RunError
from b3.model import workers
from b3.model.workers import WorkerPool, run_ahead


def act(task: Any) -> Any:
    kind, value = task
    if kind == "wait":
        time.sleep(value)
    if kind == "bad":
        raise DataError(f"words row {value}: no such image")
    if kind == "bug":
        raise KeyError(value)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return value, os.getpid()


@pytest.fixture(autouse=True, scope="module")
def pools() -> Iterator[None]:
    """Servers, which take a second to start, are kept from test to test, as subsets and epochs keep them."""
    yield
    workers.close_pools()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_the_order_of_the_tasks(count: int) -> None:
    tasks = [("wait", 0.03 * (i % 3 == 0) + i * 1e-6) for i in range(20)]
    assert [value for value, _ in run_ahead(act, tasks, count)] == [value for _, value in tasks]


def test_workers_are_kept_and_forked_from_one_thread() -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        first = {pid for _, pid in run_ahead(act, [("wait", 0.05)] * 8, 2)}
        assert {pid for _, pid in run_ahead(act, [("wait", 0.05)] * 8, 2)} <= first
        assert os.getpid() not in first and len(first) == 2
        server = workers._POOLS[2].server.pid
        assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in first}
        assert parents == {server}
    finally:
        stop.set()


@pytest.mark.parametrize("count", [0, 1])
def test_errors_arrive_as_they_were_raised(count: int) -> None:
    results = run_ahead(act, [("ok", 1), ("bad", 7), ("ok", 2)], count)
    assert next(results)[0] == 1
    with pytest.raises(DataError) as caught:
        next(results)
    assert str(caught.value) == "words row 7: no such image"
    assert next(run_ahead(act, [("ok", 3)], count))[0] == 3


def test_a_bug_in_a_worker_shows_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in act.*KeyError: 5"):
        list(run_ahead(act, [("bug", 5)], 1))


def test_a_worker_that_hangs_is_named_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    list(run_ahead(act, [("ok", 0)], 1))
    workers._POOLS[1].time_limit = 0.3
    with pytest.raises(RunError, match=r"worker 0 \(process \d+\) gave no result .* reading \('wait', 60\)"):
        list(run_ahead(act, [("ok", 1), ("wait", 60), ("ok", 2)], 1))
    assert [value for value, _ in run_ahead(act, [("ok", 1)], 1)] == [1]


def test_a_worker_that_is_killed_is_named_with_its_rows() -> None:
    with pytest.raises(RunError, match=r"worker \d \(process \d+\) died .*; it was reading \('die', 3\)"):
        list(run_ahead(act, [("ok", 1), ("die", 3), ("ok", 2)], 2))
    assert [value for value, _ in run_ahead(act, [("ok", 1)], 2)] == [1]


def test_workers_leave_signals_to_their_caller() -> None:
    pid = next(run_ahead(act, [("ok", 1)], 1))[1]
    for number in workers.SIGNALS:
        os.kill(pid, number)
        os.kill(workers._POOLS[1].server.pid, number)
    assert next(run_ahead(act, [("ok", 2)], 1)) == (2, pid)


@dataclass
class Large:
    array: np.ndarray
    column: pa.Array

    def __call__(self, task: int) -> tuple[Any, bool, torch.Tensor]:
        mapped = isinstance(self.array, np.memmap) and pa.total_allocated_bytes() < self.column.nbytes // 2
        return (int(self.array[task]), self.column[task].as_py()), mapped, torch.arange(task)


def test_large_arrays_and_columns_are_mapped_not_copied() -> None:
    data = Large(np.arange(300_000), pa.array([f"row {i}" for i in range(300_000)]))
    for task, (values, mapped, tensor) in zip((5, 299_999), run_ahead(data, (5, 299_999), 1), strict=True):
        assert values == (task, f"row {task}") and mapped and torch.equal(tensor, torch.arange(task))
    folder = workers._POOLS[1].folder
    assert len(list(folder.iterdir())) == 2
    workers.close_pools()
    assert not folder.exists()


SCRIPT = """
import os, sys
sys.path.insert(0, {folder!r})
from b3.model.workers import run_ahead
for value, pid in run_ahead(__import__("test_workers").act, [("ok", 1), ("wait", 0.1), ("ok", 2)], 2):
    print(value, flush=True)
    if {how!r} == "kill":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["return", "kill"])
def test_a_script_needs_no_guard_and_leaves_nothing_behind(tmp_path: Path, how: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(folder=str(Path(__file__).parent), how=how))
    done = run_python(tmp_path / "script.py", check=False)  # fails for a process left behind
    assert done.stdout.split() == (["1", "0.1", "2"] if how == "return" else ["1"])
    assert done.returncode == (0 if how == "return" else -signal.SIGKILL), done.stderr


def test_a_pool_ends_while_its_workers_work() -> None:
    pool = WorkerPool(2)
    task = pool.submit(pool.job(act), ("wait", 60), str)
    while task.worker is None:
        time.sleep(0.01)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert pool.server.returncode == 0


def kept_folders(place: Path) -> list[str]:
    return [path.name for path in place.glob(f"{workers.PREFIX}*")]


def test_no_temporary_folder_outlives_its_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of a server which was killed, nor that of a program which was killed with all it had started."""
    monkeypatch.setattr(workers.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(workers.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workers, "PRELOAD", ())
    lost = tmp_path / f"{workers.PREFIX}lost"
    (lost / "arrays").mkdir(parents=True)
    pool = WorkerPool(1)
    assert kept_folders(tmp_path) == [pool.folder.name], "what nobody holds is deleted when the next one is made"
    task = pool.submit(pool.job(len), "abc", str)
    assert pool.result(task) == 3
    other = WorkerPool(1)
    assert pool.folder.exists(), "a living pool is left alone"
    pool.server.kill()
    for one in (pool, other):
        one.close()
    assert kept_folders(tmp_path) == []


def test_a_new_folder_that_another_process_has_swept_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks start their pools at once: one may take another's folder for a leftover before it is locked."""
    make, swept = workers.tempfile.mkdtemp, list[str]()

    def make_and_lose(prefix: str) -> str:
        name = make(prefix=prefix)
        if not swept:
            os.rmdir(name)
            swept.append(name)
        return name

    monkeypatch.setattr(workers.tempfile, "mkdtemp", make_and_lose)
    folder, lock = workers._own_folder()
    os.close(lock)
    assert folder.is_dir() and str(folder) not in swept
    folder.rmdir()
