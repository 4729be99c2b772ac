"""The rows of a jsonl file by number: the file is mapped, and a row takes eight bytes of memory."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from b3.data.lazy import Lazy
from b3.errors import InputError

BLOCK_BYTES = 1 << 24


class Lines(Lazy[dict[str, Any]]):
    """The object on each line of a file; blank lines are none. A row raises `InputError` if its line holds none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            self._content: Any = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        super().__init__(self._row, self._starts(size))

    def _starts(self, size: int) -> np.ndarray:
        """(N,) int64: where in the file each line starts."""
        parts = [np.zeros(1, dtype=np.int64)]
        for start in range(0, size, BLOCK_BYTES):
            block = np.frombuffer(self._content[start : start + BLOCK_BYTES], dtype=np.uint8)
            parts.append(np.flatnonzero(block == ord("\n")) + (start + 1))
        starts = np.concatenate(parts)
        return starts[np.diff(starts, append=size) > 1]  # a blank line is a line feed alone

    def _text(self, start: int) -> str:
        end = self._content.find(b"\n", start)
        line: bytes = self._content[start : end if end >= 0 else len(self._content)]
        return line.decode()

    def _row(self, start: int) -> dict[str, Any]:
        try:
            row = json.loads(self._text(start))
        except ValueError as error:
            raise InputError(f"{self._file} is damaged at byte {start} ({error}); make it again") from None
        if not isinstance(row, dict):
            raise InputError(f"{self._file} is damaged at byte {start} (no object); make it again")
        return row

    def texts(self) -> Iterator[str]:
        """The lines as they are, for who looks at all of them."""
        return (self._text(int(start)) for start in self._rows)
