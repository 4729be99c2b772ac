"""The zip archives of MMEB's images: extracted below a folder, member by member, so that a run can be continued."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from b3.console import bar
from b3.errors import InputError
from b3.files import atomic, write_json

MARKERS = ".extracted"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the data set: its path there and its size in bytes."""

    path: str
    size: int


def targets_of(
    infos: Sequence[zipfile.ZipInfo], stem: str, image_paths: set[str], subsets: Sequence[str] | None
) -> list[tuple[zipfile.ZipInfo, str]]:
    """(member, its path below the image folder) of all members; with `subsets` only those of their `image_paths`."""
    place = placement(infos, stem, image_paths)
    targets = [(info, place(info.filename)) for info in infos]
    return targets if subsets is None else [(info, path) for info, path in targets if path in image_paths]


def is_there(out: Path, info: zipfile.ZipInfo, path: str) -> bool:
    """Whether a member was extracted before, going by its size."""
    try:
        status = (out / path).stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == info.file_size


def members(archive: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive. Raises `InputError` if it is broken or a member could leave the target folder."""
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = opened.infolist()
    except Exception as error:  # a damaged directory of members raises what reading it does
        raise _broken(archive, error) from None
    for info in infos:
        _check_member(archive, info)
    names_of_macos = re.compile(r"^__MACOSX/|/\.DS_Store$")
    return [info for info in infos if not info.is_dir() and not names_of_macos.search(info.filename)]


def _check_member(archive: Path, info: zipfile.ZipInfo) -> None:
    name = info.filename
    path = PurePosixPath(name)
    kind = stat.S_IFMT(info.external_attr >> 16)
    reason = ""
    if not name:
        reason = "has no name"
    elif path.is_absolute() or "\\" in name or name[1:2] == ":":
        reason = "is an absolute path or not a POSIX path"
    elif ".." in path.parts:
        reason = "leaves the folder"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a symbolic link" if kind == stat.S_IFLNK else "is a special file"
    elif info.flag_bits & 0x1:
        reason = "is encrypted"
    elif path.suffix == ".parquet" or (path.parts and path.parts[0].startswith(".")):
        reason = "would replace a data file"
    if reason:
        raise InputError(f"{archive}: member '{name}' {reason}; nothing of it was extracted, get a clean copy")


def placement(infos: Sequence[zipfile.ZipInfo], stem: str, image_paths: set[str]) -> Callable[[str], str]:
    """How a member's name becomes a path below the image folder, so that most of the rows' paths are met.

    Archives are packed from different depths; the rows decide.
    """
    choices: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: f"images/{name}",
        lambda name: f"{stem}/{name}",
        lambda name: f"images/{stem}/{name}",
        lambda name: name.partition("/")[2] or name,
    ]
    return max(choices, key=lambda choice: sum(choice(info.filename) in image_paths for info in infos))


def extract(
    archive: Path,
    out: Path,
    file: RemoteFile,
    image_paths: set[str],
    subsets: Sequence[str] | None,
    progress: bool = False,
) -> int:
    """Extract an archive below `out` and leave its marker; returns the number of files written.

    Members that are there with the right content are skipped. With `subsets` only `image_paths`, those of their rows,
    are taken.

    Raises:
        InputError: the archive is broken, or a member could leave the folder; no file is left half-written.
    """
    targets = targets_of(members(archive), archive.stem, image_paths, subsets)
    written = 0
    with zipfile.ZipFile(archive) as opened, bar(len(targets), archive.name if progress else None, "file") as shown:
        for info, path in targets:
            if not (is_there(out, info, path) and _checksum(out / path) == info.CRC):  # a power failure leaves zeros
                _extract_member(opened, info, out / path, archive)
                written += 1
            shown.update(1)
    os.sync()
    marker = {"path": file.path, "size": file.size, "members": len(targets), "subsets": subsets and sorted(subsets)}
    write_json(_marker(out, file), marker)
    return written


def _checksum(file: Path) -> int:
    """CRC-32 of a file, as zip archives hold it."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def _extract_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, archive: Path) -> None:
    try:
        with atomic(target, durable=False) as file, opened.open(info) as member:
            shutil.copyfileobj(member, file, _CHUNK)  # the CRC is tested at the end of the member
            if file.tell() != info.file_size:
                raise _broken(archive, f"'{info.filename}' has {file.tell()} bytes, its header says {info.file_size}")
    except OSError as error:
        raise unwritable(target, error) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _broken(archive, error) from None


def unwritable(target: Path, error: OSError) -> InputError:
    return InputError(f"{target} cannot be written ({error.strerror}); see to it and run the same command again")


def _broken(archive: Path, error: object) -> InputError:
    return InputError(f"{archive} is not a complete zip archive ({error}); delete it and run the same command again")


def _marker(out: Path, file: RemoteFile) -> Path:
    return out / MARKERS / (file.path.replace("/", "__") + ".json")


def marked(out: Path, file: RemoteFile, subsets: Sequence[str] | None) -> bool:
    """Whether an earlier run extracted this very archive, for these subsets or more."""
    try:
        marker = json.loads(_marker(out, file).read_text())
    except (OSError, ValueError):
        return False
    of_all, of_some = marker.get("subsets") is None, set(marker.get("subsets") or ())
    return marker.get("size") == file.size and (of_all or (subsets is not None and of_some.issuperset(subsets)))
