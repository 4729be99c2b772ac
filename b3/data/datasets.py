"""Items, training pairs and evaluation rows, as the rest of the system sees them.

An `Item` is one side of a row: a text, an image, or both. A `PairDataset` gives (query, target, negatives) by row
number; an `EvalDataset` gives a query and its own candidate list, element 0 being right (MMEB).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.data.images import FolderImages, ImageRef, ParquetImages, content_key, decode, peek

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Item:
    """One input of the embedder: `text` in the data set's form (``<|image_1|>`` stands for the image) and an image.

    `image` is None, a path, an `ImageRef` into a store, or a `PIL.Image`.
    """

    text: str
    image: ImageRef | Image.Image | str | Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Equal for items with equal content; used to encode each distinct item once."""
        return self.text, self.image_key

    @property
    def image_key(self) -> str:
        if self.image is None:
            return ""
        if isinstance(self.image, ImageRef):
            return self.image.key
        if isinstance(self.image, (str, Path)):
            return f":{self.image}"
        return content_key(self.image)

    def open_image(self) -> Image.Image | None:
        """The decoded picture, or None. Raises `DataError` if it is missing or does not decode."""
        if self.image is None:
            return None
        if isinstance(self.image, ImageRef):
            return self.image.open()
        if isinstance(self.image, (str, Path)):
            path = Path(self.image)
            return decode(FolderImages(path.parent).read(path.name), str(path))
        return self.image

    def peek_image(self) -> tuple[bytes, tuple[int, int]]:
        """(digest of the picture, (width, height)), reading the file but decoding only its header."""
        if isinstance(self.image, (str, Path)):
            path = Path(self.image)
            return peek(FolderImages(path.parent).read(path.name), str(path))
        if isinstance(self.image, ImageRef):
            return peek(self.image.store.read(self.image.path), f"{self.image.path} in {self.image.store.location}")
        assert self.image is not None
        return content_key(self.image).encode(), self.image.size

    def describe(self) -> str:
        """A short name for error messages."""
        image = self.image.path if isinstance(self.image, ImageRef) else self.image_key[:80]
        return f"text {self.text[:60]!r}" + (f" with image {image}" if image else "")


def item_id(item: Item) -> int:
    """64-bit id, equal for equal items on every rank."""
    digest = hashlib.sha256("\0".join(item.key).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def as_item(value: Item | dict[str, Any] | str) -> Item:
    """Accept an `Item`, a plain text, or ``{"text": ..., "image": ...}``."""
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(value)
    return Item(value.get("text") or "", value.get("image"))


class PairDataset:
    """Training pairs of one data set: `query(i)`, `target(i)` and `negatives(i)` for row i.

    Args:
        name: name of the subset, used in messages, plans and reports.
        table: columns `qry`, `qry_image_path`, `pos_text`, `pos_image_path` and optionally `neg_text`,
            `neg_image_path` (a string or a list of strings each), '' meaning none: the MMEB-train schema.
        images: store of the image paths, or None when no row has an image.
        family: "classification", "vqa", "retrieval" or "grounding".
        target_prefix: put before text-only targets and negatives.
    """

    def __init__(
        self,
        name: str,
        table: pa.Table,
        images: FolderImages | ParquetImages | None = None,
        family: str = "retrieval",
        target_prefix: str = "",
    ) -> None:
        self.name = name
        self.family = family
        self.images = images
        self.target_prefix = target_prefix
        self._columns = {column: table.column(column).combine_chunks() for column in table.column_names}
        self._num_rows = table.num_rows

    def __len__(self) -> int:
        return self._num_rows

    def _value(self, column: str, row: int) -> Any:
        return self._columns[column][row].as_py()

    def column(self, name: str) -> list[Any]:
        """A column as stored, without prefix."""
        values: list[Any] = self._columns[name].to_pylist()
        return values

    def _item(self, text: str | None, path: str | None, prefix: str = "") -> Item:
        if not path:
            return Item(prefix + (text or ""))
        assert self.images is not None, f"{self.name} has image paths but no image store"
        return Item(text or "", ImageRef(self.images, path))

    def query(self, row: int) -> Item:
        return self._item(self._value("qry", row), self._value("qry_image_path", row))

    def target(self, row: int) -> Item:
        return self._item(self._value("pos_text", row), self._value("pos_image_path", row), self.target_prefix)

    @property
    def has_negatives(self) -> bool:
        """Whether rows may bring negatives along."""
        return "neg_text" in self._columns

    def negatives(self, row: int) -> list[Item]:
        """Negatives stored in the data row (not the mined ones); empty texts without image are left out."""
        if not self.has_negatives:
            return []
        texts, paths = self._value("neg_text", row), self._value("neg_image_path", row)
        pairs = zip(texts, paths, strict=True) if isinstance(texts, list) else [(texts, paths)]
        return [self._item(text, path, self.target_prefix) for text, path in pairs if text or path]

    def __iter__(self) -> Iterator[tuple[Item, Item]]:
        return ((self.query(row), self.target(row)) for row in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 over all rows in order (texts and image paths, prefix included); equal data, equal fingerprint."""
        digest = hashlib.sha256(self.target_prefix.encode())
        for column in sorted(self._columns):
            digest.update(column.encode())
            for value in self._columns[column].to_pylist():
                text = value if isinstance(value, str) else "\x1e".join(v or "" for v in value or ())
                digest.update(text.encode() + b"\0")
        return digest.hexdigest()


class EvalDataset:
    """Rows of one evaluation subset in the MMEB-eval schema.

    `table` has `qry_text`, `qry_img_path` and the lists `tgt_text`, `tgt_img_path`; candidate 0 is the positive.
    `target_prefix` goes before every target text (``--tgt_prefix_mod``); `raw_candidates` gives the unprefixed pairs
    that prediction files show.
    """

    def __init__(
        self,
        name: str,
        table: pa.Table,
        images: FolderImages | ParquetImages | None = None,
        target_prefix: str = "",
    ) -> None:
        self.name = name
        self.images = images
        self.target_prefix = target_prefix
        self._rows = table.select(["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]).to_pylist()

    def __len__(self) -> int:
        return len(self._rows)

    def _item(self, text: str, path: str) -> Item:
        if not path:
            return Item(text)
        assert self.images is not None, f"{self.name} has image paths but no image store"
        return Item(text, ImageRef(self.images, path))

    def query(self, row: int) -> Item:
        record = self._rows[row]
        return self._item(record["qry_text"] or "", record["qry_img_path"] or "")

    def raw_candidates(self, row: int) -> list[tuple[str, str]]:
        """(text, image path) of each candidate as stored, without prefix."""
        record = self._rows[row]
        return [(t or "", p or "") for t, p in zip(record["tgt_text"], record["tgt_img_path"], strict=True)]

    def candidates(self, row: int) -> list[Item]:
        return [self._item(self.target_prefix + text, path) for text, path in self.raw_candidates(row)]
