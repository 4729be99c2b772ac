"""Whether images are still those that they were: a digest of some of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from b3.data.images import FolderImages, ImageRef, ParquetImages, content_key
from b3.data.items import Item, Still
from b3.errors import DataError
from b3.files import sampled_sha256

LOOKED_AT = 32


def images_digest(item_of: Callable[[int], Item], count: int) -> str:
    """A digest of the first image (or frame) of `LOOKED_AT` evenly spaced ones of `count` items; '' if none has any.

    Images that were all made anew under their old names are seen, a single one is mostly not. Of images inside a
    parquet file parts of the file are read; those inside a table of rows are left out.
    """
    rows: list[int] = np.unique(np.linspace(0, count - 1, min(LOOKED_AT, count)).astype(int)).tolist()
    files = FileDigests()
    digests = dict.fromkeys(digest for row in rows if (digest := _digest(item_of(row), files)) is not None)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32] if digests else ""


class FileDigests(dict[str, str]):
    """`sampled_sha256` by path, each once: all images that are looked at may be in one file."""

    def __missing__(self, path: str) -> str:
        self[path] = digest = sampled_sha256(Path(path))
        return digest


def _digest(item: Item, files: FileDigests) -> str | None:
    """Of the first image or frame of an item; None where it has none that is looked at."""
    stills = (one for medium in item.media for one in ([medium] if isinstance(medium, Still) else medium.frames[:1]))
    source = next((still.source for still in stills), None)
    try:
        if isinstance(source, ImageRef):
            if isinstance(source.store, ParquetImages):
                return files[str(source.store.location)]
            if isinstance(source.store, FolderImages):
                return hashlib.sha256(source.store.read(source.path)).hexdigest()
            return None
        content = Path(source).read_bytes() if isinstance(source, (str, Path)) else source
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest()
        return None if content is None else content_key(content)
    except (DataError, OSError):
        return "unreadable"
