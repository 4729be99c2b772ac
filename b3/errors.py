"""The few exceptions that a user can meet, and how a command ends on one.

A user's mistake raises an `InputError` (or a subclass) whose message is one line: what was found, where, and what to
do. Commands print that line and exit with code 2, without a traceback. A programmer's mistake is an `assert`.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable

from b3 import peers, signals


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and the remedy."""


class ConfigError(InputError):
    """A configuration file or an override does not fit the typed tree in `b3.config`."""


class DataError(InputError):
    """A row, an image or a data file cannot be used; the message names the file and the row."""


class RunError(InputError):
    """A run directory, checkpoint or plan belongs to something else, or a run cannot go on."""


def gist(error: object) -> str:
    """The first line of an exception's message, or its type if it has none; for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


EXIT_BUG = 1
EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 85  # a signal asked the run to stop: everything is saved, the same command continues

# What messages of the communication libraries hold when the other end is gone.
_SIGNS_OF_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def command(main: Callable[..., int | None], memory: str = "stop other programs") -> Callable[..., int]:
    """Wrap the `main` of a command, so that an error ends it with one line on stderr and exit code 2.

    That is: an `InputError`, memory or disk that ran out, and another rank that has ended. Anything else is a mistake
    in the program and keeps its traceback (exit code 1). One of several ranks prints its line first, with its rank, and
    leaves at once: taking the process group apart would wait for ranks that wait for this one. SIGTERM and SIGUSR1 end
    it with one line too (`b3.signals`).

    Nothing has imported torch yet when it runs, so torch's allocator is told here how to lay out GPU memory.

    Args:
        main: the function.
        memory: what to do when memory runs out.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # chunks differ in size, which would cut GPU memory into pieces
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        try:
            with signals.heeded():
                return main(*args, **kwargs) or 0
        except KeyboardInterrupt:
            line, code = signals.message(signal.SIGINT), EXIT_INTERRUPTED
        except signals.Ended as error:
            line, code = str(error), error.code
        except Exception as error:
            text = _one_line(error, memory)
            line, code = f"error: {text}", EXIT_INPUT_ERROR
            if text is None:
                if not peers.is_one_of_several():
                    raise
                line, code = f"error: {type(error).__name__}: {error}\n{traceback.format_exc()}", EXIT_BUG
        if peers.is_one_of_several():
            peers.end(line, code)
        print(f"{_rank()}{line}", file=sys.stderr, flush=True)
        return code

    return wrapped


def _rank() -> str:
    """Which rank speaks, where several were launched and have not met yet."""
    return f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _one_line(error: Exception, memory: str) -> str | None:
    """What a user is told about an error, or None for a mistake in the program."""
    text = str(error)
    if isinstance(error, InputError):
        return text
    if _is_out_of_memory(error):
        where = "GPU memory" if "CUDA" in text else "memory"
        return f"out of {where}: {memory} ({text.splitlines()[0] if text else 'MemoryError'})"
    if any(sign in text for sign in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))):
        return f"the disk is full: {text}; free space, then run the same command again to continue"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    is_of_peers = type(error).__name__.startswith("Dist") or any(sign in text for sign in _SIGNS_OF_PEERS)
    if peers.is_one_of_several() and is_of_peers:
        return peers.news() or f"another rank ended or does not answer ({text.splitlines()[0]}); this rank stops too"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return "OutOfMemoryError" in kinds or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
