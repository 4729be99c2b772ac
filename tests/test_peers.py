"""Rank 0 learns how each rank ends, and all the others from it; without torch, so that a case takes a moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, free_port

from b3 import peers

SECONDS = 60.0
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from b3 import errors, peers
folder, rank, size, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
peers.GRACE = 0.2
def gather(value):
    (folder / f"{rank}.part").write_text(json.dumps(value))
    (folder / f"{rank}.part").rename(folder / f"{rank}.json")
    files = [folder / f"{r}.json" for r in range(size)]
    while not all(map(Path.exists, files)):
        time.sleep(0.01)
    return [json.loads(file.read_text()) for file in files]
def main():
    peers.start(rank, size, limit, gather)
    (folder / f"{rank}.ready").touch()
    while not (folder / f"{rank}.do").exists():
        time.sleep(0.01)
    exec((folder / f"{rank}.do").read_text())
    peers.stop()
sys.exit(errors.command(main)())
"""


class Ranks:
    def __init__(self, folder: Path, size: int, limit: float) -> None:
        self.folder, self.size = folder, size
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder), str(rank), str(size), str(limit)],
                cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for rank in range(size)
        ]  # fmt: skip
        end = time.monotonic() + SECONDS
        while not all((folder / f"{rank}.ready").exists() for rank in range(size)) and time.monotonic() < end:
            time.sleep(0.01)

    def do(self, rank: int, code: str) -> None:
        (self.folder / f"{rank}.part").write_text(code)
        (self.folder / f"{rank}.part").rename(self.folder / f"{rank}.do")

    def ends(self, ranks: list[int]) -> list[tuple[int, str]]:
        """(exit code, message) of each."""
        parts = []
        for rank in ranks:
            _, text = self.processes[rank].communicate(timeout=SECONDS)
            parts.append((self.processes[rank].returncode, text))
        return parts


@pytest.fixture
def start(tmp_path: Path):
    started: list[Ranks] = []

    def call(size: int = 3, limit: float = 600.0) -> Ranks:
        started.append(Ranks(tmp_path, size, limit))
        return started[-1]

    yield call
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.wait()


STOPS = "; this rank stops too, and the same command continues"


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_rank_is_named_by_all_others(start: Callable[..., Ranks], lost: int) -> None:
    ranks = start()
    ranks.processes[lost].kill()
    others = [rank for rank in range(3) if rank != lost]
    text = f"rank {lost} has ended without a message (it was killed; look for memory){STOPS}"
    assert ranks.ends(others) == [(2, f"[rank {rank}] error: {text}\n") for rank in others]


@pytest.mark.parametrize("failing", [0, 2])
def test_the_reason_of_a_rank_travels(start: Callable[..., Ranks], failing: int) -> None:
    ranks = start()
    ranks.do(failing, "raise errors.RunError('the plan is torn')")
    assert ranks.ends([failing]) == [(2, f"[rank {failing}] error: the plan is torn\n")]
    others = [rank for rank in range(3) if rank != failing]
    text = f"rank {failing} has ended: the plan is torn{STOPS}"
    assert ranks.ends(others) == [(2, f"[rank {rank}] error: {text}\n") for rank in others]


def test_a_bug_is_one_line_before_its_traceback_and_travels_as_that_line(start: Callable[..., Ranks]) -> None:
    ranks = start(2)
    ranks.do(1, "raise KeyError('a\\nb')")
    ((code, text), (other_code, other)) = ranks.ends([1, 0])
    assert code == 1 and text.startswith("[rank 1] error: KeyError: ") and "Traceback" in text
    assert other_code == 2 and other == f"[rank 0] error: rank 1 has ended: KeyError: 'a\\nb'{STOPS}\n"


def test_an_error_of_its_own_comes_before_the_news(start: Callable[..., Ranks]) -> None:
    """All ranks raise the same: each says it itself, though it is told of the others meanwhile."""
    ranks = start()
    for rank in range(3):
        ranks.do(rank, "peers.GRACE = 60; raise errors.RunError('the loss is nan')")
    assert ranks.ends([0, 1, 2]) == [(2, f"[rank {rank}] error: the loss is nan\n") for rank in range(3)]


def test_a_message_that_fails_is_explained_by_the_news(start: Callable[..., Ranks]) -> None:
    ranks = start(2)
    ranks.do(1, "raise RuntimeError('[gloo/pair.cc:5] Connection closed by peer [::1]:5')")
    ranks.processes[0].kill()
    text = f"rank 0 has ended without a message (it was killed; look for memory){STOPS}"
    assert ranks.ends([1]) == [(2, f"[rank 1] error: {text}\n")]


def test_ranks_that_are_done_are_not_lost(start: Callable[..., Ranks]) -> None:
    ranks = start()
    ranks.do(0, "")
    assert ranks.ends([0]) == [(0, "")]
    ranks.do(2, "")
    assert ranks.ends([2]) == [(0, "")]
    time.sleep(0.5)  # longer than the time that is left to a rank that is told of another's end
    ranks.do(1, "")
    assert ranks.ends([1]) == [(0, "")]


@pytest.mark.parametrize("hung", [0, 1])
def test_a_rank_that_hangs_is_lost_after_the_limit(start: Callable[..., Ranks], hung: int) -> None:
    ranks = start(limit=4.0)
    ranks.processes[hung].send_signal(signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != hung]
    ends = ranks.ends(others)
    text = f"rank {hung} has not answered for 4 seconds{STOPS}"
    assert ends == [(2, f"[rank {rank}] error: {text}\n") for rank in others]


def test_a_rank_that_cannot_be_watched_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()  # nobody listens there
    peers.start(3, 4, 60.0, lambda value: [(["127.0.0.1"], port, "token"), value])
    try:
        text = capsys.readouterr().err
        assert text.startswith(f"note: rank 3 cannot reach rank 0 at 127.0.0.1, port {port} (")
        assert peers.is_one_of_several() and peers.news(0) is None
        peers.tell("nobody hears this")
    finally:
        peers.stop()
    assert not peers.is_one_of_several()


def test_a_stranger_on_the_port_is_turned_away(start: Callable[..., Ranks]) -> None:
    import json
    import socket

    ranks = start(2)
    _, port, _ = json.loads((ranks.folder / "0.json").read_text())
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"token": "guess", "hello": 1}\n')
        stranger.settimeout(SECONDS)
        assert stranger.recv(1) == b""
    for rank in (0, 1):
        ranks.do(rank, "")
    assert ranks.ends([0, 1]) == [(0, ""), (0, "")]
