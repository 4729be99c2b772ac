"""The few exceptions that a user can meet, and how a command ends on one.

A user's mistake raises an `InputError` (or a subclass) whose message is one line: what was found, where, and what to
do. Commands print that line and exit with code 2, without a traceback. A programmer's mistake is an `assert`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and the remedy."""


class ConfigError(InputError):
    """A configuration file or an override does not fit the typed tree in `b3.config`."""


class DataError(InputError):
    """A row, an image or a data file cannot be used; the message names the file and the row."""


class RunError(InputError):
    """A run directory, checkpoint or plan belongs to something else, or a run cannot go on."""


EXIT_INPUT_ERROR = 2
EXIT_STOPPED = 85  # a signal asked the run to stop: everything is saved, the same command continues


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap the `main` of a command: an `InputError` becomes one line on stderr and exit code 2.

    Under torchrun each rank prints its own line, since an error can concern a single rank; ranks after the first
    name themselves.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f"[rank {rank}] "
            print(f"{where}error: {error}", file=sys.stderr, flush=True)
            return EXIT_INPUT_ERROR
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return 130

    return wrapped
