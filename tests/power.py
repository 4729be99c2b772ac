"""A disk whose power fails: what a folder may hold afterwards, at every moment of a program.

`Disk(folder)` notes, while it is entered, the order in which names change and what is synced. A crash keeps what was
synced. Of the rest it keeps any part: each name of each folder as it was synced or as it is, each file with its synced
bytes, its bytes now, or as many zeros. A name is on disk when its folder was synced, bytes when their file was.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = 0  # the number of the folder itself
CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir")
Names = dict[int, dict[str, int]]  # of each folder: the number of what has a name


@dataclass
class Moment:
    """After a call: names and bytes as programs see them, and as they are on disk."""

    call: str
    names: Names
    content: dict[int, bytes]
    synced_names: Names
    synced: dict[int, bytes]


@dataclass
class Disk:
    folder: Path
    moments: list[Moment] = field(default_factory=list)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)
    _real: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _synced_names: Names = field(default_factory=dict)
    _synced: dict[int, bytes] = field(default_factory=dict)
    _known: dict[bytes, bytes] = field(default_factory=dict)  # equal bytes are kept once

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        names, content = self._look()
        self._synced_names, self._synced = names, content  # what was there before is on disk
        self._note("start")
        for name in (*CHANGES, "fsync", "sync"):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._watched(name))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        self._note("end")
        for descriptor in self._held:
            os.close(descriptor)

    def _watched(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = self._real[name](*arguments, **options)
            if name in ("fsync", "sync"):
                self._sync(arguments[0] if arguments else None)
            where = arguments[-1] if name in ("replace", "rename") else arguments[0] if arguments else ""
            self._note(f"{name} {where}")
            return result

        return call

    def _number(self, path: Path) -> int:
        """Of a file or folder; it is held open, so that no other gets its number."""
        status = path.stat()
        key = (status.st_dev, status.st_ino)
        if key not in self._numbers:
            self._held.append(os.open(path, os.O_RDONLY))
            self._numbers[key] = ROOT if path == self.folder else len(self._numbers) + 1
        return self._numbers[key]

    def _look(self) -> tuple[Names, dict[int, bytes]]:
        names: Names = {}
        content: dict[int, bytes] = {}
        for place, folders, files in os.walk(self.folder):
            of_folder = names.setdefault(self._number(Path(place)), {})
            for name in (*folders, *files):
                of_folder[name] = self._number(Path(place) / name)
            for name in files:
                data = (Path(place) / name).read_bytes()
                content[of_folder[name]] = self._known.setdefault(data, data)
        return names, content

    def _sync(self, descriptor: int | None) -> None:
        names, content = self._look()
        if descriptor is None:
            self._synced_names, self._synced = names, {**self._synced, **content}
            return
        status = os.fstat(descriptor)
        number = self._numbers.get((status.st_dev, status.st_ino))
        if number in names:
            self._synced_names = {**self._synced_names, number: names[number]}
        elif number in content:
            self._synced = {**self._synced, number: content[number]}

    def _note(self, call: str) -> None:
        names, content = self._look()
        if self.moments and self.moments[-1].synced_names is self._synced_names:
            last = self.moments[-1]
            if (last.names, last.content) == (names, content) and last.synced is self._synced:
                return
        known = self.moments[-1].content if self.moments else {}  # an open file may have no name any more
        self.moments.append(Moment(call, names, {**known, **content}, self._synced_names, self._synced))

    def crashes(self, seed: int = 0, mixtures: int = 2) -> Iterator[tuple[str, Tree]]:
        """Trees that may be there after a crash, each with a description of the moment."""
        rng = random.Random(seed)
        seen: set[bytes] = set()
        for number, moment in enumerate(self.moments):
            for choice in ("synced", "named", *["mixed"] * mixtures):
                tree = Tree.of(moment, choice, rng)
                if tree.digest not in seen:
                    seen.add(tree.digest)
                    yield f"moment {number} of {len(self.moments)} ({moment.call}), {choice}", tree


@dataclass
class Tree:
    """Paths and bytes; None for a folder."""

    files: dict[str, bytes | None]

    @classmethod
    def of(cls, moment: Moment, choice: str, rng: random.Random) -> Tree:
        files: dict[str, bytes | None] = {}

        def names(number: int) -> dict[str, int]:
            old, new = moment.synced_names.get(number, {}), moment.names.get(number, {})
            if choice != "mixed":
                return old if choice == "synced" else new
            chosen = {name: rng.choice((old, new)).get(name) for name in sorted({*old, *new})}
            return {name: one for name, one in chosen.items() if one is not None}

        def content(number: int) -> bytes:
            old, new = moment.synced.get(number, b""), moment.content.get(number, b"")
            return rng.choice((old, new, bytes(len(new)))) if choice == "mixed" and old != new else old

        def walk(number: int, place: str) -> None:
            for name, one in sorted(names(number).items()):
                if one in moment.content:
                    files[place + name] = content(one)
                elif place.count("/") < 20:  # a folder that was moved may be met twice
                    files[place + name] = None
                    walk(one, f"{place}{name}/")

        walk(ROOT, "")
        return cls(files)

    @property
    def digest(self) -> bytes:
        whole = hashlib.sha256()
        for path, data in self.files.items():
            whole.update(f"{path}\0{-1 if data is None else len(data)}\0".encode() + (data or b""))
        return whole.digest()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for path, data in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if data is None:
                (folder / path).mkdir(exist_ok=True)
            else:
                (folder / path).write_bytes(data)
        return folder
