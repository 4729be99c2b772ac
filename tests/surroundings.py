"""Surroundings that a machine may have, put into a process before its program runs; all are picklable.

`Power`: a record of what a power failure would leave. `Late`: a file system over a network that shows new files late.
`Clock`: a clock that jumps back. `SmallFiles`: a limit on the size of files.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
import stat as kinds
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from power import Disk


@dataclass(frozen=True)
class Late:
    """Files below `folder` that another process has renamed are not there for so many seconds, on some ranks.

    since: a time; files that have not changed after it are there.
    """

    folder: str
    seconds: float = 3.0
    ranks: tuple[int, ...] = (1, 2)
    since: float = 0.0

    def __call__(self, rank: int) -> None:
        if rank not in self.ranks:
            return
        stat, own = os.stat, set[str]()

        def is_hidden(path: Any) -> bool:
            if isinstance(path, int):
                return False
            name = os.path.abspath(os.fsdecode(path))
            if not name.startswith(self.folder) or name in own:
                return False
            try:
                status = stat(name)
            except OSError:
                return False
            # renaming a file sets its time of change
            is_new = status.st_ctime > self.since and time.time() - status.st_ctime < self.seconds
            return is_new and not kinds.S_ISDIR(status.st_mode)

        def reading(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **options: Any) -> Any:
                mode = str(arguments[0] if arguments else options.get("mode", "r"))
                if set(mode) & set("wax"):
                    own.add(os.path.abspath(os.fsdecode(path)))
                elif is_hidden(path):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
                return real(path, *arguments, **options)

            return call

        def looking(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **options: Any) -> Any:
                if is_hidden(path):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
                return real(path, *arguments, **options)

            return call

        def renaming(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(source: Any, target: Any, **options: Any) -> Any:
                own.add(os.path.abspath(os.fsdecode(target)))
                return real(source, target, **options)

            return call

        listdir, scandir = os.listdir, os.scandir

        def list_names(path: Any = ".") -> list[str]:
            return [name for name in listdir(path) if isinstance(path, int) or not is_hidden(os.path.join(path, name))]

        @contextmanager
        def scan(path: Any = ".") -> Iterator[Iterator[os.DirEntry[str]]]:
            with scandir(path) as entries:
                yield (entry for entry in entries if isinstance(path, int) or not is_hidden(entry.path))

        os.stat, os.listdir, os.scandir = looking(stat), list_names, scan  # type: ignore[assignment]
        os.replace, os.rename = renaming(os.replace), renaming(os.rename)
        builtins.open = io.open = reading(io.open)  # type: ignore[assignment]


@dataclass(frozen=True)
class Clock:
    """The time of day goes back by a day now and then, and to the year 1970."""

    def __call__(self, rank: int) -> None:
        real, calls = time.time, 0

        def jumping() -> float:
            nonlocal calls
            calls += 1
            return 1000.0 + calls if calls % 3 == 0 else real() - 86400.0 * (calls % 5)

        time.time = jumping


@dataclass(frozen=True)
class Power:
    """Keep the moments of `power.Disk` of a folder, pickled in a file when the program ends."""

    folder: str
    file: str

    def __call__(self, rank: int) -> None:
        disk, leave = Disk(Path(self.folder)).__enter__(), os._exit

        def keep(code: int) -> None:
            disk.__exit__(None, None, None)
            Path(self.file).write_bytes(pickle.dumps(disk.moments))
            leave(code)

        os._exit = keep  # type: ignore[assignment]


@dataclass(frozen=True)
class SmallFiles:
    """No file grows beyond so many bytes."""

    size: int

    def __call__(self, rank: int) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def is_one_line(text: str) -> bool:
    """Whether a program that failed said why in one line, and showed no traceback."""
    return "Traceback" not in text and sum("error: " in line for line in text.splitlines()) == 1
