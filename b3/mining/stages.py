"""The stages of mining: their seconds and progress, and results on disk from which an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Progress = Callable[[str, int, int], None]


class Clock:
    """Seconds and progress by stage; a stage that comes several times adds up."""

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


class Stages:
    """Arrays of finished stages in a folder, each under a key of all that it depends on.

    A file is written under another name first, so that a torn one is never read; one with another key is ignored.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @staticmethod
    def key(**facts: Any) -> str:
        """A digest of JSON-like values."""
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def load(self, name: str, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a stage, or None."""
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as stored:
                if str(stored["key"]) != key:
                    return None
                return {field: stored[field] for field in stored.files if field != "key"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, name: str, key: str, arrays: dict[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}.npz"
        with temporary.open("wb") as stream:
            np.savez(stream, key=np.asarray(key), **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / f"{name}.npz")

    def remove(self) -> None:
        """Delete the folder: what came of the stages is saved elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
