"""A user's own rows as items.

Rows are jsonl or parquet files, or tar shards (`b3.data.row_files`). A row has a text, an image, or both; an image is a
path, encoded bytes, or the struct {bytes, path} of the `datasets` library; in jsonl bytes come as base64 under
`image_base64`. Bytes are read again when they are needed, and what else a row holds is kept in a file that is mapped
once it is large, so that memory grows neither with the images nor with the rows.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.data.digests import digest, first_seen, joined
from b3.data.images import ImageRef
from b3.data.items import Item
from b3.data.lazy import Lazy
from b3.data.prompts import PLACEHOLDER
from b3.data.row_files import READERS, Columns, Record, RowImage, files_of, image_of
from b3.data.spool import Spool
from b3.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_TOKENS = (PLACEHOLDER, "<|image_pad|>")


class OwnData:
    """N rows of files: what to embed, and what a result shows.

    Attributes:
        files: that hold the rows.
        items: of the rows.
        shown: {"id", "text", "image"} of each row; `image` is an absolute path, or None where there is none or it is
            inside the file.
    """

    def __init__(self, files: list[Path], table: pa.Table, columns: Columns, root: Path, instruction: str) -> None:
        self.files = files
        self._cells = {name: table[name] for name in table.column_names}
        self._columns, self._root, self._instruction = columns, root, instruction
        self.items: Sequence[Item] = Lazy(self._item, range(len(table)))
        self.shown: Sequence[Record] = Lazy(self._shown, range(len(table)))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> list[str | int]:
        return [row["id"] for row in self.shown]

    def _get(self, name: str, row: int) -> Any:
        return self._cells[name][row].as_py()

    def _file_of_image(self, row: int) -> str | None:
        image = self._get("image", row)
        return image and _absolute(image, self._root)

    def _item(self, row: int) -> Item:
        image, is_inside = self._get("image", row), self._get("is_inside", row)
        text = prompt(self._get("text", row) or "", bool(image or is_inside), self._instruction)
        if not (image or is_inside):
            return Item(text)
        where, place = self._get("where", row), (self._get("first", row), self._get("second", row))
        file = str(self.files[self._get("file", row)])
        store = RowImage(file, self._columns.image, place, self._file_of_image(row))
        return Item(text, ImageRef(store, f"of {where}" if is_inside else f"'{image}' of {where}"))

    def _shown(self, row: int) -> Record:
        key = self._get("id", row)
        return {
            "id": row if key is None else json.loads(key),
            "text": self._get("text", row) or "",
            "image": self._file_of_image(row),
        }


def _schema() -> pa.Schema:
    """Of what is kept of a row: its name, its place, its text, the path of its image, its id as JSON."""
    import pyarrow as pa

    kinds = {"where": pa.string(), "file": pa.int32(), "first": pa.int64(), "second": pa.int64(), "text": pa.string()}
    return pa.schema({**kinds, "image": pa.string(), "is_inside": pa.bool_(), "id": pa.string()})


def _absolute(image: str, root: Path) -> str:
    return os.path.abspath(root / Path(image).expanduser())


def read_rows(
    file: str | Path, columns: Columns | None = None, image_dir: str | Path | None = None, instruction: str = ""
) -> OwnData:
    """All rows of a jsonl or parquet file or a tar shard, or of all files that a pattern matches.

    Args:
        file: its last part may be a pattern (``shard-*.tar``); files are read in the order of their names.
        columns: names of the columns.
        image_dir: folder that image paths are relative to (default: the file's own).
        instruction: put before each text.

    Raises:
        DataError: naming file and row: it is not readable, is empty, has an image that is missing, or repeats an id.
    """
    file, columns = Path(file), columns or Columns()
    files = files_of(file)
    root = Path(image_dir) if image_dir is not None else file.parent
    if not root.is_dir():
        raise DataError(f"--image-dir {root} is not a folder; give that of the images")
    has_ids: bool | None = None
    with Spool(_schema()) as spool:
        for number, part in enumerate(files):
            for where, place, record in READERS[part.suffix](part, columns):
                try:
                    image = _checked_image(record, columns, root)
                    text, key = record.get(columns.text), record.get(columns.id)
                    _check_text(text, bool(image), columns, instruction)
                    if has_ids is None:
                        has_ids = key is not None
                    if has_ids != (key is not None):
                        raise DataError(
                            f"{'no' if has_ids else 'an'} '{columns.id}', unlike the rows before; give all rows one,"
                            " or none"
                        )
                    path, is_inside = (image, False) if isinstance(image, str) else (None, bool(image))
                    packed = json.dumps(key if isinstance(key, (str, int)) else str(key)) if has_ids else None
                    spool.add(where, number, *place, text, path, is_inside, packed)
                except DataError as error:
                    raise DataError(f"{part}: {where}: {error}") from None
        table = spool.table()
    if not len(table):
        raise DataError(f"{file} has no rows")
    if has_ids:
        _check_ids(files, table, columns)
    return OwnData(files, table, columns, root, instruction)


def _checked_image(record: Record, columns: Columns, root: Path) -> Any:
    """Path of a row's image, which is there; its bytes or `INSIDE`; or None."""
    image = image_of(record, columns.image) or None
    if isinstance(image, str) and not os.path.isfile(_absolute(image, root)):
        raise DataError(f"image '{image}' is not in {root}; check --image-dir")
    return image


def _check_text(text: Any, has_image: bool, columns: Columns, instruction: str) -> None:
    if text is not None and not isinstance(text, str):
        raise DataError(f"'{columns.text}' is {type(text).__name__}; a text is needed")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"'{columns.text}' is not valid Unicode ({error.reason}); correct it") from None
    if not has_image and not (text or "").strip():
        raise DataError("neither text nor image; drop it or check the column names")
    whole = prompt(text or "", has_image, instruction)
    count = sum(whole.count(token) for token in IMAGE_TOKENS)
    if has_image and count != 1:
        raise DataError(f"the text has {count} image placeholders; at most one {PLACEHOLDER}")


def _check_ids(files: list[Path], table: pa.Table, columns: Columns) -> None:
    """Raise `DataError` for the first row with the id of an earlier one."""
    keys = (key for chunk in table["id"].chunks for key in chunk.to_pylist())
    first, number = first_seen(joined(digest(key) for key in keys))
    if len(first) == len(table):
        return
    row = int(np.flatnonzero(first[number] != np.arange(len(table)))[0])
    before = int(first[number[row]])
    names = [table["where"][i].as_py() for i in (before, row)]
    parts = [files[table["file"][i].as_py()] for i in (before, row)]
    earlier = names[0] if parts[0] == parts[1] else f"{names[0]} of {parts[0]}"
    key = json.loads(table["id"][row].as_py())
    raise DataError(f"{parts[1]}: {names[1]}: repeats the '{columns.id}' {key!r} of {earlier}; ids must differ")


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


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how to read a file of rows."""
    rows, names = parser.add_argument_group("rows"), Columns()
    rows.add_argument("--text-column", default=names.text)
    rows.add_argument("--image-column", default=names.image)
    rows.add_argument("--id-column", default=names.id)
    rows.add_argument("--image-dir", type=Path, help="folder of the image paths (default: that of the file)")


def columns_of(arguments: argparse.Namespace) -> Columns:
    return Columns(arguments.text_column, arguments.image_column, arguments.id_column)
