"""Compressed tar archives, possibly in parts, extracted below a folder so that it can be continued.

A tar archive has no directory: it is read once, from front to end. Each member is checked before it is written.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from b3.console import bar
from b3.errors import InputError
from b3.files import atomic

CHUNK = 1 << 20


class Joined(io.RawIOBase):
    """Files one after another as one stream of bytes (``x.tar.gz-00``, ``x.tar.gz-01``, ...)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._open: io.BufferedReader | None = None
        self.consumed = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._open is None:
                if not self._files:
                    return 0
                self._open = self._files.pop(0).open("rb")
            count = self._open.readinto(buffer)
            if count:
                self.consumed += count
                return count
            self._open.close()
            self._open = None

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        super().close()


def extract(parts: Sequence[Path], out: Path, place: Callable[[str], str | None], progress: bool = False) -> int:
    """Extract an archive below `out`; returns the number of files written. Files there with the right content are kept.

    Args:
        parts: of the archive, in order.
        place: from a member's name to its path below `out`, or None for a member that is not wanted.

    Raises:
        InputError: the archive is broken, or a member is a link, a device, or would leave `out`. Nothing is written
            outside, and no file is left half-written.
    """
    written, raw = 0, Joined(parts)
    total = sum(part.stat().st_size for part in parts)
    try:
        with (
            io.BufferedReader(raw, CHUNK) as stream,
            tarfile.open(fileobj=stream, mode="r|*") as archive,
            bar(total, parts[0].name if progress else None, "B") as shown,
        ):
            for member in archive:
                shown.update(raw.consumed - shown.n)
                if member.isdir() or _is_junk(member.name):
                    continue
                target = place(_checked(parts[0], member))
                if target is None:
                    continue
                content = archive.extractfile(member)
                assert content is not None, "only regular files come here"
                written += _write(content, out / target, _is_there(out / target, member.size))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(
            f"{parts[0]} is not a complete tar archive ({error}); delete it and run the same command again"
        ) from None
    os.sync()
    return written


def _write(content: IO[bytes], target: Path, is_there: bool) -> bool:
    """Write a member, unless a file of its size holds it: a power failure leaves zeros. Whether it was written."""
    equal, block = 0, b""  # blocks
    if is_there:
        with target.open("rb") as old:
            while (block := content.read(CHUNK)) and old.read(len(block)) == block:
                equal += 1
        if not block:
            return False
    with atomic(target, durable=False) as file:
        if equal:
            with target.open("rb") as old:
                for _ in range(equal):
                    file.write(old.read(CHUNK))
        file.write(block)
        shutil.copyfileobj(content, file, CHUNK)
    return True


def _is_junk(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _checked(archive: Path, member: tarfile.TarInfo) -> str:
    """The member's name without a leading ``./``. Raises `InputError` if it cannot be extracted safely."""
    path = PurePosixPath(member.name)
    reason = ""
    if path.is_absolute() or "\\" in member.name:
        reason = "is an absolute path or not a POSIX path"
    elif ".." in path.parts:
        reason = "leaves the folder"
    elif member.issym() or member.islnk():
        reason = "is a link"
    elif not member.isfile():
        reason = "is a special file"
    if reason:
        raise InputError(f"{archive}: member '{member.name}' {reason}; get a clean copy")
    return path.as_posix()
