"""Progress bars: live on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
