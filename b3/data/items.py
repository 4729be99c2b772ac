"""One side of a row: a text, an image, or both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.data.images import FolderImages, ImageRef, content_key, decode, peek

if TYPE_CHECKING:
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
        """The decoded image, or None. Raises `DataError` if it is missing or does not decode."""
        if self.image is None:
            return None
        if isinstance(self.image, ImageRef):
            return self.image.open()
        if isinstance(self.image, (str, Path)):
            path = Path(self.image)
            return decode(FolderImages(path.parent).read(path.name), str(path))
        return self.image

    def peek_image(self) -> tuple[bytes, tuple[int, int]]:
        """(digest of the image, (width, height)), reading the file but decoding only its header."""
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
