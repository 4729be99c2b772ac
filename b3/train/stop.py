"""SIGTERM and SIGUSR1 ask a run to stop: it ends the step it is in, saves, and leaves with `EXIT_STOPPED`."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from b3 import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
