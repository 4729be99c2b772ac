"""Files that no reader, and no later run, ever sees half of; which folder belongs to what; telling content apart."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

from b3 import locks
from b3.errors import RunError
from b3.memory import room_for

SHOWN_CHANGES = 3
APPEARS_SECONDS = 90.0  # NFS looks for new names at least once a minute
REMOVED = ".removed-"  # before the name of a folder whose files are being deleted


@contextmanager
def atomic(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary stream that takes the name `path` once all of it is on disk: readers see the old file or the new one.

    Then its name is on disk too, so that files survive a power failure in the order in which they were written. Not
    `durable`: neither may have reached the disk yet; for many small files, whose writer syncs once after all.
    """
    make(path.parent) if durable else path.parent.mkdir(parents=True, exist_ok=True)
    stream = _temporary(path)
    try:
        with stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
            os.replace(stream.name, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno in _OF_WRITING:
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            os.unlink(stream.name)


_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")


def _temporary(path: Path) -> IO[bytes]:
    """A new file beside `path` that is locked as long as it is open: `tidy` tells by that whether its writer lives."""
    while True:
        stream = path.with_name(f".{path.name[:55]}.{secrets.token_hex(4)}.tmp").open("xb")
        taken = locks.take(stream.fileno())
        if taken is None or (taken and locks.is_named(stream.fileno(), stream.name)):
            return stream
        stream.close()  # taken for a leftover before it was locked


def tidy(folder: Path) -> None:
    """Delete the unfinished files that killed processes have left below a folder."""
    for file in [file for file in folder.rglob(".*.tmp") if _TEMPORARY.match(file.name) and file.is_file()]:
        with suppress(OSError), file.open("rb") as stream:
            if locks.take(stream.fileno()):
                file.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, **options: Any) -> None:
    """Write `value` and a line feed atomically; `options` of `json.dumps`, by default an indent of 2."""
    write_text(path, json.dumps(value, **{"indent": 2, **options}) + "\n")


def write_array(path: Path, array: np.ndarray, durable: bool = True) -> None:
    """Write an .npy file atomically."""
    with atomic(path, durable) as stream:  # numpy writes to a real file by itself, and says not why it could not
        np.save(SimpleNamespace(write=stream.write), array, allow_pickle=False)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems over a network do not sync folders
            raise
    finally:
        os.close(handle)


def make(folder: Path) -> None:
    """Make a folder and those above it where they are missing, and put their names on disk."""
    if not folder.exists():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """Put a folder, its name and all that it holds on disk."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        sync(path)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there: it leaves its name before its files, so that a kill shows nobody half of it."""
    hidden = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # left by a kill
    if folder.exists():
        folder.rename(hidden)
        sync(folder.parent)
        shutil.rmtree(hidden)


def publish(staged: Path, target: Path) -> None:
    """Give a finished folder its name, in place of what has it, once all that it holds is on disk."""
    sync_tree(staged)
    remove(target)
    staged.rename(target)
    sync(target.parent)


def move_in(staged: Path, folder: Path, last: str) -> None:
    """Give the files of a finished folder their names in another, where older ones may have them.

    Readers look for the file `last` first: they find all old files, all new ones, or it is missing.
    """
    sync_tree(staged)
    (folder / last).unlink(missing_ok=True)
    sync(folder)
    for file in sorted((p for p in staged.rglob("*") if p.is_file()), key=lambda p: p == staged / last):
        target = folder / file.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == staged / last:
            sync(folder)
        file.replace(target)
        sync(target.parent)
    shutil.rmtree(staged)


def wait_for(file: Path) -> None:
    """Return once a file that another rank has written is here: a file system over a network may show it late.

    Raises `RunError` if it does not come within `APPEARS_SECONDS`.
    """
    end = time.monotonic() + APPEARS_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            raise RunError(
                f"{file}, which another rank has written, is not here after {APPEARS_SECONDS:.0f} seconds; give a"
                " folder that all machines share"
            )
        with suppress(OSError):
            os.listdir(file.parent)  # asks the server again
        time.sleep(0.1)


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sampled_sha256(file: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """SHA-256 of a file's size and of `blocks` evenly spaced parts; of all its bytes where it has no more than these.

    For large files that are looked at often: other weights or arrays under the same name differ all over.
    """
    length = file.stat().st_size
    if length <= blocks * size:
        return sha256(file)
    digest = hashlib.sha256(str(length).encode())
    with file.open("rb") as stream:
        for number in range(blocks):
            stream.seek((length - size) * number // (blocks - 1))
            digest.update(stream.read(size))
    return digest.hexdigest()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}.{key}" if prefix else key)
    return result


def changes(known: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """By dotted key, "key was OLD, now NEW" for all of `facts` that `known` does not say, in the order of `facts`.

    Both hold JSON values; a key that is missing counts as None.
    """
    result: dict[str, str] = {}
    for name, new in facts.items():
        old_keys, new_keys = flat(known.get(name), name), flat(new, name)
        for key in new_keys | old_keys:
            if old_keys.get(key) != new_keys.get(key):
                result[key] = f"{key} was {old_keys.get(key)!r}, now {new_keys.get(key)!r}"
    return result


def belongs_elsewhere(folder: Path, kind: str, differing: Iterable[str], remedy: str) -> RunError:
    """The error to raise where `folder` holds another `kind`; `differing` from `changes`, the first three are shown."""
    lines = list(differing)
    more = len(lines) - SHOWN_CHANGES
    text = "; ".join(lines[:SHOWN_CHANGES]) + (f"; and {more} more" if more > 0 else "")
    return RunError(f"{folder} holds another {kind} ({text}); {remedy}")


def claim(
    folder: Path,
    facts: Mapping[str, Any],
    kind: str,
    remedy: str,
    *,
    file: str = "manifest.json",
    foreign: Callable[[str], bool] = lambda name: True,
    ignore: Collection[str] = (),
) -> dict[str, Any] | None:
    """Whose folder is this: check that `folder` is free, or holds what `facts` describe.

    Args:
        folder: need not exist.
        facts: JSON values, all that decides what the folder holds. Other entries of its record are not compared.
        kind: what it holds ("evaluation"), for messages.
        remedy: what to do about it ("choose another --out or delete it"), for messages.
        file: the record, JSON, that whoever fills the folder leaves there (see `write_json`).
        foreign: whether a visible file of that name, where there is no record, makes the folder somebody else's.
        ignore: dotted keys of `facts` that may differ.

    Returns:
        What the record says, or None if there is none yet.

    Raises:
        RunError: the folder holds something else; the message names what differs, the old value and the new one.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; {remedy}")
    if not (folder / file).exists():
        visible = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []
        others = [name for name in visible if foreign(name)]
        if others:
            raise RunError(f"{folder} holds other files ({others[0]}) and no {kind}; {remedy}")
        return None
    try:
        record = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / file} cannot be read ({str(error).splitlines()[0]}); {remedy}") from None
    if not isinstance(record, dict):
        raise RunError(f"{folder / file} is not the record of a {kind}; {remedy}")
    differing = [line for key, line in changes(record, facts).items() if key not in ignore]
    if differing:
        raise belongs_elsewhere(folder, kind, differing, remedy)
    return record


def _member(stored: Any, name: str) -> np.ndarray:
    """An array of an .npz file that is open, read into where there is room for it."""
    with stored.zip.open(f"{name}.npy") as stream:
        is_simple = np.lib.format.read_magic(stream) == (1, 0)
        shape, is_fortran, dtype = (
            np.lib.format.read_array_header_1_0(stream) if is_simple else ((), True, np.dtype("O"))
        )
        if is_fortran or not shape or dtype.hasobject:
            array: np.ndarray = stored[name]
            return array
        array = room_for(shape, dtype)
        rest = array.reshape(-1).view(np.uint8).data
        while len(rest):
            num = stream.readinto(rest[: 1 << 22])
            if not num:
                raise EOFError(f"{name} is cut off")
            rest = rest[num:]
        stream.read(1)  # the end, where the checksum is compared
    return array


class Stages:
    """Arrays of finished stages in a folder, each under a key of all that it depends on; others are ignored."""

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
                return {field: _member(stored, field) for field in stored.files if field != "key"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, name: str, key: str, arrays: dict[str, np.ndarray]) -> None:
        with atomic(self.folder / f"{name}.npz") as stream:
            np.savez(stream, key=np.asarray(key), **arrays)  # type: ignore[arg-type]

    def remove(self) -> None:
        """Delete the folder: what came of the stages is saved elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
