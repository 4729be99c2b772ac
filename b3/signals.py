"""What a program does when it is asked to end: unwind, say one line, leave.

SIGTERM and SIGUSR1 raise `Ended` in the main thread as SIGINT raises KeyboardInterrupt, so that unfinished files are
deleted and finished batches kept. A thread that waits inside a library for another rank runs no handler of Python;
after `PATIENCE` seconds the process is ended from another one. Training has its own answer (`b3.train.stop`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from b3 import peers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 20.0  # seconds; launchers and clusters kill after 30


class Ended(BaseException):
    """A signal asked the program to end; `code` is its exit code, as a shell gives it."""

    def __init__(self, number: int) -> None:
        super().__init__(message(number))
        self.code = 128 + number


def message(number: int) -> str:
    name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"{name}; run the same command again to continue"


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(number)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Answer signals so while this is entered; in the main thread, and where nobody else answers them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    free = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    there, here = os.pipe()
    os.set_blocking(here, False)
    before = signal.set_wakeup_fd(here, warn_on_full_buffer=False)
    is_over = threading.Event()
    threading.Thread(target=_end_later, args=(there, is_over), name="b3-ending", daemon=True).start()
    for number in free:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(before)
        os.close(here)  # ends the thread
        for number in free:
            signal.signal(number, signal.SIG_DFL)


def _end_later(pipe: int, is_over: threading.Event) -> None:
    """Read the numbers of signals, which Python writes as they come, whatever the main thread does."""
    while number := os.read(pipe, 1):
        if number[0] in (*SIGNALS, signal.SIGINT) and not is_over.wait(PATIENCE):
            peers.end(message(number[0]), 128 + number[0])
    os.close(pipe)
