"""A user's own rows as items, and the folder that holds their embeddings.

Rows are a jsonl or parquet file. A row has a text, an image, or both; an image is a path, encoded bytes, or the struct
{bytes, path} of the `datasets` library; in jsonl bytes come as base64 under `image_base64`. Bytes are read again when
they are needed, so that memory does not grow with the images.

The index folder: `embeddings.npy` (N, D) float32, `ids.json`, `rows.jsonl` (what a result shows) and, written last,
`manifest.json`: what decided the vectors, that is the checkpoints, the rows and the options.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b3.data.images import FolderImages, ImageRef, RowGroups
from b3.data.items import Item
from b3.data.prompts import PLACEHOLDER
from b3.errors import DataError, InputError
from b3.files import claim, sha256, write_array, write_json, write_text

BASE64_KEY = "image_base64"
KIND = "b3 embeddings"
FILES = ("embeddings.npy", "ids.json", "rows.jsonl", "manifest.json")
IMAGE_TOKENS = (PLACEHOLDER, "<|image_pad|>")
KEEP_GROUPS = 16


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns; a file may lack those that its rows do not need."""

    text: str = "text"
    image: str = "image"
    id: str = "id"


@dataclass
class OwnData:
    """Rows of a file: what to embed, under which ids, and what a result shows.

    shown: {"id", "text", "image"} of each row; `image` is an absolute path, or None where there is none or it is
        inside the file. images_sha256: over paths and sizes of the image files.
    """

    items: list[Item]
    ids: list[str | int]
    shown: list[dict[str, Any]]
    images_sha256: str


class RowImages(FolderImages):
    """Images of a user's rows, under names that tell the row, so that an error about an image names it."""

    def __init__(self, root: Path, file: Path, columns: Columns) -> None:
        super().__init__(root)
        self.location = str(file)
        self._places: dict[str, Any] = {}
        self._names: dict[Path, str] = {}
        self._packed = RowGroups(self.location, columns.image, KEEP_GROUPS)

    def add_file(self, where: str, value: str) -> ImageRef:
        """An image that is a file; equal paths are one image."""
        path = Path(os.path.abspath(self.root / Path(value).expanduser()))
        name = self._names.setdefault(path, f"'{value}' of {where}")
        self._places[name] = path
        return ImageRef(self, name)

    def add_bytes(self, where: str, place: Any) -> ImageRef:
        """An image inside the file; `place` is a byte offset (jsonl) or (row group, row) (parquet)."""
        name = f"of {where}"
        self._places[name] = place
        return ImageRef(self, name)

    def file(self, name: str) -> Path | None:
        """The image file of that name, None if the image is inside the rows."""
        place = self._places[name]
        return place if isinstance(place, Path) else None

    @property
    def files(self) -> list[Path]:
        return list(self._names)

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def read(self, path: str) -> bytes:
        place = self._places[path]
        if isinstance(place, tuple):
            value = self._packed.value(*place)
            return value["bytes"] if isinstance(value, dict) else value
        try:
            return place.read_bytes() if isinstance(place, Path) else self._from_jsonl(place)
        except OSError as error:
            raise DataError(f"image {path} in {self.location} cannot be read ({error.strerror}: {place})") from None

    def _from_jsonl(self, offset: int) -> bytes:
        with open(self.location, "rb") as file:
            file.seek(offset)
            return _unpack(json.loads(file.readline())[BASE64_KEY])


def _unpack(value: str) -> bytes:
    """Bytes of a base64 text, which may be a data URI."""
    head, comma, rest = value.partition(",")
    return base64.b64decode(rest if comma and head.startswith("data:") else value, validate=True)


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
        raise DataError(f"image_dir {root} is not a folder")
    readers: dict[str, Callable[[Path, Columns], Iterator[_Row]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise DataError(f"{file} ends in '{file.suffix}'; give a .jsonl or .parquet file")
    store = RowImages(root, file, columns)
    data = OwnData([], [], [], "")
    seen: dict[str | int, str] = {}
    for number, row in enumerate(readers[file.suffix](file, columns)):
        item = _item(file, row, store, instruction)
        key = _row_id(file, row, number, columns.id, seen)
        assert item.image is None or isinstance(item.image, ImageRef)
        path = store.file(item.image.path) if item.image is not None else None
        data.items.append(item)
        data.ids.append(key)
        data.shown.append({"id": key, "text": row.text, "image": path and str(path)})
    if not data.items:
        raise DataError(f"{file} has no rows")
    digest = hashlib.sha256()
    for path in store.files:
        digest.update(f"{os.path.relpath(path, root)}\0{path.stat().st_size}\n".encode())
    data.images_sha256 = digest.hexdigest()
    return data


@dataclass(slots=True)
class _Row:
    """One row as read: `where` names it, `place` finds its bytes again if it holds any."""

    where: str
    text: str
    path: str | None
    place: Any
    id: Any


def _read_jsonl(file: Path, columns: Columns) -> Iterator[_Row]:
    offset, row = 0, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            start, offset = offset, offset + len(line)
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
            image, packed = record.get(columns.image), record.get(BASE64_KEY)
            if packed:
                try:
                    _unpack(packed)
                except (binascii.Error, ValueError, TypeError, AttributeError) as error:
                    raise DataError(f"{file}: {where}: {BASE64_KEY} is not base64 ({error}); correct the row") from None
            _check_types(file, where, columns, record.get(columns.text), image)
            place = start if packed else None
            path = None if packed else image
            yield _Row(where, record.get(columns.text) or "", path or None, place, record.get(columns.id))


def _read_parquet(file: Path, columns: Columns) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, memory_map=True)
        names = [n for n in (columns.text, columns.image, columns.id) if n in opened.schema_arrow.names]
        if columns.text not in names and columns.image not in names:
            raise DataError(
                f"{file} has neither column '{columns.text}' nor '{columns.image}'; found"
                f" {', '.join(opened.schema_arrow.names)}; name them with --text-column and --image-column"
            )
        row = 0
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=names)
            for index in range(table.num_rows):
                record = {name: table.column(name)[index].as_py() for name in names}
                where, image, place = f"row {row}", record.get(columns.image), None
                row += 1
                if isinstance(image, dict):
                    image = image.get("bytes") or image.get("path")
                if isinstance(image, bytes):
                    image, place = None, (group, index) if image else None
                _check_types(file, where, columns, record.get(columns.text), image)
                yield _Row(where, record.get(columns.text) or "", image or None, place, record.get(columns.id))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _check_types(file: Path, where: str, columns: Columns, text: Any, image: Any) -> None:
    if text is not None and not isinstance(text, str):
        raise DataError(f"{file}: {where}: '{columns.text}' is {type(text).__name__}; a text is needed")
    if image is not None and not isinstance(image, str):
        raise DataError(f"{file}: {where}: '{columns.image}' is {type(image).__name__}; a path or bytes are needed")


def _item(file: Path, row: _Row, store: RowImages, instruction: str) -> Item:
    image = None
    if row.path is not None:
        image = store.add_file(row.where, row.path)
        path = store.file(image.path)
        if path is None or not path.is_file():
            raise DataError(f"{file}: {row.where}: image '{row.path}' is not in {store.root}; check --image-dir")
    elif row.place is not None:
        image = store.add_bytes(row.where, row.place)
    elif not row.text.strip():
        raise DataError(f"{file}: {row.where} has neither text nor image; drop it or check the column names")
    text = prompt(row.text, image is not None, instruction)
    count = sum(text.count(token) for token in IMAGE_TOKENS)
    if image is not None and count != 1:
        raise DataError(f"{file}: {row.where}: the text has {count} image placeholders; at most one {PLACEHOLDER}")
    return Item(text, image)


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


def _row_id(file: Path, row: _Row, number: int, column: str, seen: dict[str | int, str]) -> str | int:
    """The row's id, or its number where no row has one; `seen` maps the ids so far to their rows."""
    if number and (row.id is None) != (not seen):
        has = "has no" if row.id is None else "has an"
        raise DataError(f"{file}: {row.where} {has} '{column}', unlike the rows before; give all rows one, or none")
    if row.id is None:
        return number
    key = row.id if isinstance(row.id, (str, int)) else str(row.id)
    if key in seen:
        raise DataError(f"{file}: {row.where} repeats the '{column}' {key!r} of {seen[key]}; ids must differ")
    seen[key] = row.where
    return key


def describe_checkpoint(name: str | None, key_of: Callable[[str], str]) -> dict[str, str] | None:
    """{"name", "key"} of a checkpoint for the manifest; a folder's name becomes absolute. None for None."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    return {"name": str(folder.resolve()) if folder.is_dir() else name, "key": key_of(name)}


def add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say how to read a file of rows."""
    rows, names = parser.add_argument_group("rows"), Columns()
    rows.add_argument("--text-column", default=names.text)
    rows.add_argument("--image-column", default=names.image)
    rows.add_argument("--id-column", default=names.id)
    rows.add_argument("--image-dir", type=Path, help="folder of the image paths (default: that of the file)")


def columns_of(arguments: argparse.Namespace) -> Columns:
    return Columns(arguments.text_column, arguments.image_column, arguments.id_column)


def model_arguments(manifest: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Embedder.from_pretrained` for the model of an index."""
    options = manifest["options"]
    pixels = {name: options[name] for name in ("min_pixels", "max_pixels") if options[name] is not None}
    adapter = manifest["adapter"] and manifest["adapter"]["name"]
    return {"name": manifest["model"]["name"], "adapter": adapter, "dtype": options["dtype"], **pixels}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder. Raises `InputError` if there is none or it is not one of embeddings."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} holds no finished embeddings (no manifest.json); run scripts/embed.py") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{file} is not one of scripts/embed.py; choose another folder")
    return manifest


def is_done(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether `folder` holds just these embeddings. Raises `RunError` naming what differs if it holds others."""
    paths = ("input.path", "input.path_images")  # the same rows may have moved
    remedy = "choose another --out or delete it"
    known = claim(folder, identity, "index", remedy, foreign=lambda name: name not in FILES, ignore=paths)
    return known is not None and all((folder / name).is_file() for name in FILES)


def identity_of(
    data: OwnData, file: Path, columns: Columns, image_dir: Path | None, checkpoints: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """What decides the vectors, in the form that the manifest keeps."""
    where = {"path": str(file.resolve()), "path_images": str((image_dir or file.parent).resolve())}
    content = {"sha256": sha256(file), "images_sha256": data.images_sha256}
    return {"kind": KIND, **checkpoints, "input": where | content, "options": options | asdict(columns)}


def save_index(folder: Path, vectors: np.ndarray, data: OwnData, manifest: dict[str, Any]) -> None:
    """Write an index folder, its manifest last."""
    assert vectors.dtype == np.float32
    assert len(vectors) == len(data.ids)
    (folder / "manifest.json").unlink(missing_ok=True)
    write_array(folder / "embeddings.npy", vectors)
    write_json(folder / "ids.json", data.ids, indent=None, ensure_ascii=False)
    write_text(folder / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data.shown))
    write_json(folder / "manifest.json", manifest, ensure_ascii=False)


def load_index(folder: Path) -> tuple[np.ndarray, list[dict[str, Any]], dict[str, Any]]:
    """(vectors (N, D), what each row shows, manifest). Raises `InputError` if a file is missing or does not fit."""
    manifest = read_manifest(folder)
    try:
        vectors = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder} is not complete ({error}); run scripts/embed.py again") from None
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise InputError(f"{folder}: {vectors.shape} vectors but {len(rows)} rows; delete it and embed again")
    return vectors, rows, manifest
