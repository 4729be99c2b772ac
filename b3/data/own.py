"""A user's own rows as items.

Rows are a jsonl or parquet file. A row has a text, an image, or both; an image is a path, encoded bytes, or the struct
{bytes, path} of the `datasets` library; in jsonl bytes come as base64 under `image_base64`. Bytes are read again when
they are needed, so that memory does not grow with the images.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from b3.data.images import ImageRef, RowGroups
from b3.data.items import Item
from b3.data.prompts import PLACEHOLDER
from b3.errors import DataError

BASE64_KEY = "image_base64"
IMAGE_TOKENS = (PLACEHOLDER, "<|image_pad|>")
KEEP_GROUPS = 16

Place = tuple[int, int] | int  # of a row in its file: (row group, row in it) of a parquet, byte offset in a jsonl
Record = dict[str, Any]  # one row, by column


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns; a file may lack those that its rows do not need."""

    text: str = "text"
    image: str = "image"
    id: str = "id"


@dataclass(frozen=True, slots=True)
class OwnData:
    """N rows of a file: what to embed, and what a result shows.

    shown: {"id", "text", "image"} of each row; `image` is an absolute path, or None where there is none or it is
        inside the file.
    """

    items: list[Item]
    shown: list[Record]

    @property
    def ids(self) -> list[str | int]:
        return [row["id"] for row in self.shown]


class RowImages:
    """The store of a file's images, under names that tell the row, so that an error about an image names it.

    Args:
        root: folder that image paths are relative to.
    """

    def __init__(self, file: Path, columns: Columns, root: Path) -> None:
        self.location, self.columns, self.root = str(file), columns, root
        self._places: dict[str, Path | Place] = {}
        self._groups = RowGroups(self.location, columns.image, KEEP_GROUPS)

    def add(self, where: str, place: Place, record: Record) -> ImageRef | None:
        """The image of a row, if it has one. Raises `DataError` if it is no image or a file that is missing."""
        image = image_of(record, self.columns)
        if not image:
            return None
        if isinstance(image, bytes):
            name = f"of {where}"
            self._places[name] = place
        else:
            name, file = f"'{image}' of {where}", Path(os.path.abspath(self.root / Path(image).expanduser()))
            if not file.is_file():
                raise DataError(f"image '{image}' is not in {self.root}; check --image-dir")
            self._places[name] = file
        return ImageRef(self, name)

    def file(self, image: ImageRef | None) -> str | None:
        """The path of an image; None if it is inside the rows, or None."""
        place = None if image is None else self._places[image.path]
        return str(place) if isinstance(place, Path) else None

    def read(self, path: str) -> bytes:
        place = self._places[path]
        try:
            if isinstance(place, Path):
                return place.read_bytes()
            if isinstance(place, int):
                with open(self.location, "rb") as file:
                    file.seek(place)
                    record = json.loads(file.readline())
            else:
                record = {self.columns.image: self._groups.value(*place)}
        except OSError as error:
            raise DataError(f"image {path} in {self.location} cannot be read ({error.strerror}: {place})") from None
        content = image_of(record, self.columns)
        assert isinstance(content, bytes)
        return content


def image_of(record: Record, columns: Columns) -> str | bytes | None:
    """Path or encoded bytes of a row's image; None or empty if it has none. Raises `DataError` for anything else."""
    image = record.get(columns.image)
    if packed := record.get(BASE64_KEY):  # may be a data URI
        try:
            return base64.b64decode(packed.partition(",")[2] if packed.startswith("data:") else packed, validate=True)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{BASE64_KEY} is not base64 ({error}); correct the row") from None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is not None and not isinstance(image, (str, bytes)):
        raise DataError(f"'{columns.image}' is {type(image).__name__}; a path or bytes are needed")
    return image


def read_rows(
    file: str | Path, columns: Columns | None = None, image_dir: str | Path | None = None, instruction: str = ""
) -> OwnData:
    """All rows of a jsonl or parquet file.

    Args:
        columns: names of the columns.
        image_dir: folder that image paths are relative to (default: the file's own).
        instruction: put before each text.

    Raises:
        DataError: naming file and row: it is not readable, is empty, has an image that is missing, or repeats an id.
    """
    file, columns = Path(file), columns or Columns()
    if not file.is_file():
        raise DataError(f"{file} does not exist; give a .jsonl or .parquet file")
    root = Path(image_dir) if image_dir is not None else file.parent
    if not root.is_dir():
        raise DataError(f"--image-dir {root} is not a folder; give that of the images")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise DataError(f"{file} is neither .jsonl nor .parquet; give one of these")
    store, data, row_of_id = RowImages(file, columns, root), OwnData([], []), dict[str | int, str]()
    for where, place, record in readers[file.suffix](file, columns):
        try:
            image = store.add(where, place, record)
            data.items.append(Item(_prompt_of(record.get(columns.text), image, columns, instruction), image))
            key = _id_of(record.get(columns.id), where, columns, row_of_id, len(data.shown))
        except DataError as error:
            raise DataError(f"{file}: {where}: {error}") from None
        data.shown.append({"id": key, "text": record.get(columns.text) or "", "image": store.file(image)})
    if not data.items:
        raise DataError(f"{file} has no rows")
    return data


def _read_jsonl(file: Path, columns: Columns) -> Iterator[tuple[str, Place, Record]]:
    """(name, place, values) of each row; blank lines are none."""
    offset, row = 0, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place, offset = offset, offset + len(line)
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


def _prompt_of(text: Any, image: ImageRef | None, columns: Columns, instruction: str) -> str:
    if text is not None and not isinstance(text, str):
        raise DataError(f"'{columns.text}' is {type(text).__name__}; a text is needed")
    if image is None and not (text or "").strip():
        raise DataError("neither text nor image; drop it or check the column names")
    result = prompt(text or "", image is not None, instruction)
    count = sum(result.count(token) for token in IMAGE_TOKENS)
    if image is not None and count != 1:
        raise DataError(f"the text has {count} image placeholders; at most one {PLACEHOLDER}")
    return result


def prompt(text: str, has_image: bool, instruction: str = "") -> str:
    """The text as the model reads it: placeholder of the image first (if the text has none), then the instruction."""
    head = f"{PLACEHOLDER}\n"
    if instruction:
        start, rest = (head, text[len(head) :]) if text.startswith(head) else ("", text)
        gap = " " if rest and not instruction[-1].isspace() else ""
        text = start + instruction + gap + rest
    if has_image and not any(token in text for token in IMAGE_TOKENS):
        return head + text
    return text


def instructed(item: Item, instruction: str, has_place: bool) -> Item:
    """A row's item with an instruction: as such where the model's prompt rule has a place for one, else in its text."""
    if has_place:
        return Item(item.text, media=item.media, instruction=instruction or None)
    return Item(prompt(item.text or "", bool(item.media), instruction), media=item.media)


def _id_of(value: Any, where: str, columns: Columns, row_of_id: dict[str | int, str], number: int) -> str | int:
    """A row's id, or its number where no row has one; `row_of_id` names the row of each id so far."""
    if number and (value is None) != (not row_of_id):
        raise DataError(
            f"{'no' if value is None else 'an'} '{columns.id}', unlike the rows before; give all rows one, or none"
        )
    if value is None:
        return number
    key = value if isinstance(value, (str, int)) else str(value)
    if key in row_of_id:
        raise DataError(f"repeats the '{columns.id}' {key!r} of {row_of_id[key]}; ids must differ")
    row_of_id[key] = where
    return key


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how to read a file of rows."""
    rows, names = parser.add_argument_group("rows"), Columns()
    rows.add_argument("--text-column", default=names.text)
    rows.add_argument("--image-column", default=names.image)
    rows.add_argument("--id-column", default=names.id)
    rows.add_argument("--image-dir", type=Path, help="folder of the image paths (default: that of the file)")


def columns_of(arguments: argparse.Namespace) -> Columns:
    return Columns(arguments.text_column, arguments.image_column, arguments.id_column)
