"""Files of a user's rows, read once from front to end; images are read again, by place, when they are needed.

jsonl: a row on each line. parquet: a row group at a time. tar: shards as webdataset writes them, members of one name
but for the ending being a row (``0001.jpg``, ``0001.txt``, ``0001.json``); nothing is extracted.
"""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from b3.data.images import RowGroups
from b3.errors import DataError

BASE64_KEY = "image_base64"
KEEP_GROUPS = 16
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXT_ENDING, JSON_ENDING = "txt", "json"
INSIDE = object()  # the image of a row lies in its file and was not read

Place = tuple[int, int]  # in the file of the rows: (offset, bytes), or (row group, row in it) of a parquet
Record = dict[str, Any]  # one row, by column


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns; a file may lack those that its rows do not need."""

    text: str = "text"
    image: str = "image"
    id: str = "id"


@dataclass(unsafe_hash=True, slots=True)
class RowImage:
    """The store of one row's image; small, as it travels with its item. Its name there tells the row.

    Args:
        location: file of the rows.
        column: of the image.
        file: the image's own file; None: it is in `location` at `place`.
    """

    location: str
    column: str
    place: Place
    file: str | None = None

    def read(self, path: str) -> bytes:
        try:
            return Path(self.file).read_bytes() if self.file else self._inside()
        except OSError as error:
            where = self.file or self.place
            raise DataError(f"image {path} in {self.location} cannot be read ({error.strerror}: {where})") from None

    def _inside(self) -> bytes:
        first, second = self.place
        if self.location.endswith(".parquet"):
            record = {self.column: _groups(self.location, self.column).value(first, second)}
        else:
            with open(self.location, "rb") as file:
                file.seek(first)
                content = file.read(second)
            if self.location.endswith(".tar"):
                return content
            record = json.loads(content)
        image = image_of(record, self.column)
        assert isinstance(image, bytes)
        return image


@lru_cache(maxsize=4)
def _groups(file: str, column: str) -> RowGroups:
    return RowGroups(file, column, KEEP_GROUPS)


def image_of(record: Record, column: str) -> Any:
    """Path, encoded bytes or `INSIDE` of a row's image; None or empty if it has none.

    Raises `DataError` for anything else.
    """
    image = record.get(column)
    if packed := record.get(BASE64_KEY):  # may be a data URI
        try:
            return base64.b64decode(packed.partition(",")[2] if packed.startswith("data:") else packed, validate=True)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{BASE64_KEY} is not base64 ({error}); correct the row") from None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is not None and image is not INSIDE and not isinstance(image, (str, bytes)):
        raise DataError(f"'{column}' is {type(image).__name__}; a path or bytes are needed")
    return image


def files_of(given: Path) -> list[Path]:
    """The file, or those that a pattern in its last part matches, by name. Raises `DataError` if there is none."""
    if given.is_file():
        files = [given]
    else:
        files = sorted(path for path in given.parent.glob(given.name) if path.is_file()) if given.name else []
    known = ", ".join(READERS)
    if not files:
        raise DataError(f"{given} does not exist; give a file or a pattern of files: {known}")
    strange = next((file for file in files if file.suffix not in READERS), None)
    if strange is not None:
        raise DataError(f"{strange} is none of {known}; give one of these")
    return files


def _read_jsonl(file: Path, columns: Columns) -> Iterator[tuple[str, Place, Record]]:
    """(name, place, values) of each row; blank lines are none."""
    offset, row = 0, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place, offset = (offset, len(line)), offset + len(line)
            if not line.strip():
                continue
            where = f"row {row} (line {number})"
            row += 1
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}: {where} is not JSON ({error}); correct the line") from None
            if not isinstance(record, dict):
                raise DataError(f"{file}: {where} is not an object; write {{'{columns.text}': ...}} on each line")
            yield where, place, record


def _read_parquet(file: Path, columns: Columns) -> Iterator[tuple[str, Place, Record]]:
    """As `_read_jsonl`; one row group is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, memory_map=True)
        present = opened.schema_arrow.names
        names = [name for name in (columns.text, columns.image, columns.id) if name in present]
        if columns.text not in names and columns.image not in names:
            raise DataError(
                f"{file} has neither column '{columns.text}' nor '{columns.image}'; found {', '.join(present)};"
                " name them with --text-column and --image-column"
            )
        row = 0
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=names)
            for index in range(table.num_rows):
                yield f"row {row}", (group, index), {name: table.column(name)[index].as_py() for name in names}
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _read_tar(file: Path, columns: Columns) -> Iterator[tuple[str, Place, Record]]:
    """As `_read_jsonl`; of an image only its place is read. A row without an id has the name of its members."""
    for row, (key, members) in enumerate(_samples(file)):
        where = f"row {row} ({key})"
        try:
            yield where, *_sample(file, key, members, columns)
        except (ValueError, OSError) as error:
            raise DataError(f"{file}: {where} cannot be read ({error}); write the shard again") from None


def _samples(file: Path) -> Iterator[tuple[str, dict[str, Place]]]:
    """(name, {ending: (offset, bytes)}) of the consecutive members that share a name."""
    key, members = "", dict[str, Place]()
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:", errors="replace") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not member.isfile() or member.issparse() or not dot or not stem:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if folder + slash + stem != key and members:
                    yield key, members
                    members = {}
                key = folder + slash + stem
                members[ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{file} cannot be read as an uncompressed tar archive ({error}); write it again") from None
    if members:
        yield key, members


def _sample(file: Path, key: str, members: dict[str, Place], columns: Columns) -> tuple[Place, Record]:
    """(place of the image, values) of a row. Raises `ValueError` for members that make none."""

    def content(ending: str) -> str:
        offset, size = members[ending]
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size).decode()

    record: Record = json.loads(content(JSON_ENDING)) if JSON_ENDING in members else {}
    if not isinstance(record, dict):
        raise ValueError(f"{key}.{JSON_ENDING} is not an object")
    for ending in (columns.text, TEXT_ENDING):
        if columns.text not in record and ending in members:
            record[columns.text] = content(ending)
    record.setdefault(columns.id, key)
    endings = [columns.image] if columns.image in members else [e for e in members if e in IMAGE_ENDINGS]
    if len(endings) > 1:
        raise ValueError(f"it has several images, {', '.join(endings)}; name the ending with --image-column")
    record.pop(BASE64_KEY, None)
    record[columns.image] = INSIDE if endings else None
    return members[endings[0]] if endings else (0, 0), record


READERS: dict[str, Callable[[Path, Columns], Iterator[tuple[str, Place, Record]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
}
