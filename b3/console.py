"""What a person at the terminal sees: bars, numbers as people read them; and what a stage took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]  # name of the stage, how much of it is done, of how much


def bar(total: int, label: str | None, unit: str, initial: int = 0, leave: bool = False) -> Any:
    """A tqdm bar on stderr; `label` None shows nothing. Away from a terminal it prints at most twice a minute."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        disable=label is None,
        leave=leave and live,
        mininterval=0.1 if live else 30.0,
        maxinterval=10.0 if live else 60.0,
        delay=0.0 if live else 30.0,
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars of `transformers` (loading and writing weights)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def duration(seconds: float) -> str:
    """1.5 s, 42 s, 7 min, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min"


def num_bytes(size: float) -> str:
    """512 bytes, 1.5 KiB, 2.0 GiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def count(number: float) -> str:
    """950, 28.1 k, 1.23 M, 2.21 G: three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def percent(share: float, digits: int = 1) -> str:
    """0.2344 as "23.4 %", which does not break at the space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def peak_memory(device: Any = None) -> int:
    """Bytes: the most that a CUDA `device` had allocated, else the most that this process had resident."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Clock:
    """Seconds by stage, and who is told of the progress; a stage that comes several times adds up."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.progress:
            self.progress(name, 0, 1)
        yield
        if self.progress:
            self.progress(name, 1, 1)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
