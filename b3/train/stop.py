"""How a run ends before its last step because it was asked to.

SIGTERM and SIGUSR1 ask a run to stop: it ends the step it is in, saves, and leaves with `EXIT_STOPPED`. A second
SIGTERM or SIGINT ends it at once, also where it waits for another rank inside a library. What ends the others when a
rank dies is `b3.peers`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from b3 import distributed, peers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AT_ONCE = (signal.SIGTERM, signal.SIGINT)
PAUSE = 2.0  # seconds; a cluster may send one signal twice: to the task, and through the program that started it


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
        self._wakeup = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
            there, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=_end_on_the_second, args=(there,), name="b3-signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._before)
            os.close(self._wakeup)  # ends the thread
            self._wakeup = -1
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        return distributed.any_rank(self.name is not None)


def _end_on_the_second(pipe: int) -> None:
    """Read the numbers of signals, which Python writes as they come, whatever the main thread does."""
    first: float | None = None
    while number := os.read(pipe, 1):
        now = time.monotonic()
        if first is None:
            first = now
        elif number[0] in AT_ONCE and now - first > PAUSE:
            name = signal.Signals(number[0]).name
            peers.end(f"error: ended at once by a second signal ({name}); nothing was saved since", 128 + number[0])
    os.close(pipe)
