"""When a rank dies: the others say so, with its name where it is known, instead of hanging or a page of C++."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from b3 import distributed
from b3.errors import RunError

_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


class Roll:
    """Which process is which rank, noted while all are alive (a collective call)."""

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
        """Ranks on this machine whose process has ended."""
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
