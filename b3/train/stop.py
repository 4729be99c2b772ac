"""How a run ends before its last step: it was asked to (a signal), or a rank died.

SIGTERM and SIGUSR1 ask a run to stop: it ends the step it is in, saves, and leaves with `EXIT_STOPPED`. When a rank
dies the others say so, with its name where it is known, instead of hanging or a page of C++.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from b3 import distributed
from b3.errors import RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# What messages of the communication libraries hold when the other end is gone.
_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


class Stopped(Exception):
    """The run was asked to stop before its first step; nothing new is to be saved."""


class StopRequest:
    """Notes the signals while it is entered; ranks agree on it at the end of a step.

    A cluster may signal one rank only, or each at another moment. `agreed` is a collective call, so every rank stops
    after the same step.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        return distributed.any_rank(self.name is not None)


class Witness:
    """Knows which process is which rank, noted while all are alive (a collective call)."""

    def __init__(self) -> None:
        self.processes: list[tuple[str, int]] = distributed.gather_objects((socket.gethostname(), os.getpid()))

    def lost(self, error: BaseException, step: int) -> RunError | None:
        """What to tell the user if `error` came from talking to another rank, else None."""
        import torch.distributed as dist

        if distributed.world_size() == 1 or not isinstance(error, RuntimeError):
            return None
        known = isinstance(error, getattr(dist, "DistError", ())) or any(sign in str(error) for sign in _SIGNS)
        if not known:
            return None
        gone = self.gone()
        who = "rank " + ", ".join(map(str, gone)) + " has ended" if gone else "another rank ended or does not answer"
        return RunError(
            f"{who} at step {step + 1}; this rank stops too. The first message above says why it ended (none: it was"
            " killed, look for memory); the same command continues from the last checkpoint"
        )

    def gone(self, patience: float = 2.0) -> list[int]:
        """Ranks on this machine whose process has ended; waits for one at most `patience` seconds."""
        here = socket.gethostname()
        end = time.monotonic() + patience
        while True:
            gone = [r for r, (host, process) in enumerate(self.processes) if host == here and not _runs(process)]
            if gone or time.monotonic() > end:
                return gone
            time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or no /proc here
        return True
    return state not in "ZX"
