"""One rank of three fails: it says so first, with its rank; the others end soon and name it, whatever they wait in."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from faults import OOM, Fault, block_forever, bug, disk_full, kill, no_memory, out_of_memory
from forks import Job

RANKS = 3
START_UP = 600.0  # seconds until the fault, on a machine that is busy with other work
SECONDS = 120.0  # from the fault on; an idle machine needs `peers.GRACE`, and the time limit of messages is 30 minutes
STEP, SAVE = "b3.train.step:CachedStep.__call__", "b3.train.checkpoint:save_moments"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failure")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


@pytest.fixture
def start(root: Path):
    """Start a run with a fault on one rank; whatever of it is left is killed after the test."""
    jobs: list[Job] = []

    def call(name: str, fault: Callable[[int], None], ranks: int = RANKS, *overrides: str) -> Job:
        settings = (f"output_dir={root / name}", "train.steps=2000", "train.save_every=4", *overrides)
        jobs.append(Job(root / "logs" / name, str(root / "recipe.yaml"), *settings, ranks=ranks, prepare=fault))
        return jobs[-1]

    yield call
    for job in jobs:
        job.kill()
        job.wait()


CASES = {
    "killed": (Fault(kill, STEP, 2), -signal.SIGKILL, None, "rank 2 has ended without a message (it was killed"),
    "killed, first": (Fault(kill, STEP, 0), -signal.SIGKILL, None, "rank 0 has ended without a message (it was killed"),
    "a bug": (Fault(bug, STEP, 1), 1, "[rank 1] error: IndexError: a bug", "rank 1 has ended: IndexError: a bug"),
    "memory": (
        Fault(out_of_memory, STEP, 1),
        2,
        "[rank 1] error: out of GPU memory: lower train.chunk_tokens, or set model.gradient_checkpointing=true"
        f" ({OOM})",
        "rank 1 has ended: out of GPU memory: lower train.chunk_tokens",
    ),
    "disk": (
        Fault(disk_full, SAVE, 0, call=1),
        2,
        "[rank 0] error: the disk is full: [Errno 28] No space left on device: 'checkpoint'; free space",
        "rank 0 has ended: the disk is full",
    ),
}


@pytest.mark.parametrize(
    ("name", "is_blocking"), [*((name, True) for name in CASES), ("killed", False), ("a bug", False)]
)
def test_one_rank_fails_and_all_end(start: Callable[..., Job], name: str, is_blocking: bool) -> None:
    """Also where the others wait in C for good, as in a collective of NCCL."""
    fault, code, message, news = CASES[name]
    fault = replace(fault, blocking=is_blocking)
    started = start(f"{name}-{is_blocking}".replace(", ", "-").replace(" ", "-"), fault)
    failing = started.processes[fault.rank]
    failing.join(START_UP)
    assert failing.exitcode == code, started.text(fault.rank)
    codes = started.wait(SECONDS)
    assert codes == [code if r == fault.rank else 2 for r in range(RANKS)], [started.text(r) for r in range(RANKS)]
    text = started.text(fault.rank)
    if message is not None:
        first = next(line for line in text.splitlines() if "error" in line or "Traceback" in line)
        assert first.startswith(message)
        assert ("Traceback" in text) == (code == 1)
    for rank in set(range(RANKS)) - {fault.rank}:
        errors = [line for line in started.text(rank).splitlines() if "error: " in line]
        assert len(errors) == 1 and errors[0].startswith(f"[rank {rank}] error: {news}"), started.text(rank)
        assert "Traceback" not in started.text(rank)


def test_batches_that_do_not_fit_are_refused_before_the_first_step(start: Callable[..., Job], root: Path) -> None:
    started = start("room", no_memory, 1, "train.workers=2")
    assert started.wait(START_UP) == [2], started.text()
    line = next(line for line in started.text().splitlines() if "error: " in line)
    assert re.match(r"error: batches that are read ahead take .* 1000 bytes are free; set train.workers to 0 or", line)
    assert not (root / "room" / "metrics.jsonl").exists()


def test_a_second_signal_ends_a_rank_that_waits_in_a_library(root: Path, start: Callable[..., Job]) -> None:
    started = start("second", Fault(block_forever, STEP, 0, call=2), 1)
    assert started.when(lambda: (root / "second" / "metrics.jsonl").exists(), START_UP), started.text()
    started.signal(signal.SIGTERM, 0)
    time.sleep(2.5)  # `stop.PAUSE`: the same signal may come twice
    assert started.processes[0].is_alive()
    started.signal(signal.SIGTERM, 0)
    assert started.wait(SECONDS) == [128 + signal.SIGTERM], started.text()
    assert "error: ended at once by a second signal (SIGTERM)" in started.text()
