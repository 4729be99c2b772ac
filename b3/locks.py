"""Locks on files, which the kernel gives back however a process ends: who writes a folder, what a kill has left.

Where a file system knows no locks, nothing is refused and nothing is deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from b3.errors import RunError

LOCK = ".lock"
PATIENCE = 10.0  # seconds; a run that is being killed lets go when its last process has ended


def take(descriptor: int) -> bool | None:
    """Lock an open file or folder without waiting: whether it worked; None: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_named(descriptor: int, path: str | Path) -> bool:
    """Whether an open file still has this name: the last holder of a lock deletes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


@contextlib.contextmanager
def alone(folder: Path, kind: str, remedy: str, file: Path | None = None) -> Iterator[None]:
    """Keep other processes, on this machine or others, from writing a folder meanwhile.

    Args:
        folder: made if it is not there.
        kind: what writes it ("run"), for messages.
        remedy: what to do about it ("choose another --out"), for messages.
        file: the lock; by default `.lock` in the folder. It is deleted at the end; after a kill it stays, and is free.

    Raises:
        RunError: another process holds it and goes on holding it, or the folder cannot be written.
    """
    lock, end = file or folder / LOCK, time.monotonic() + PATIENCE
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; {remedy}")
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror}); {remedy}") from None
        taken = take(descriptor)
        if taken is None or (taken and is_named(descriptor, lock)):
            break
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        if not taken and time.monotonic() > end:
            who = f" ({holder})" if holder else ""
            raise RunError(f"{folder} is being written by another {kind}{who}; wait until it ends, or {remedy}")
        time.sleep(0.05)
    try:
        with contextlib.suppress(OSError):  # a full disk: the name of the holder is for messages only
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
