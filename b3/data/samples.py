"""Whether images are still those that they were: a digest of some of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
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
    digests = dict.fromkeys(digest for row in rows for digest in _digests(item_of(row)))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32] if digests else ""


def _digests(item: Item) -> Iterator[str]:
    stills: Iterable[Still] = (one for m in item.media for one in ([m] if isinstance(m, Still) else m.frames[:1]))
    for still in stills:
        source = still.source
        try:
            if isinstance(source, ImageRef) and isinstance(source.store, ParquetImages):
                yield sampled_sha256(Path(source.store.location))
            elif isinstance(source, ImageRef) and isinstance(source.store, FolderImages):
                yield hashlib.sha256(source.store.read(source.path)).hexdigest()
            elif isinstance(source, (str, Path)):
                yield hashlib.sha256(Path(source).read_bytes()).hexdigest()
            elif isinstance(source, bytes):
                yield hashlib.sha256(source).hexdigest()
            elif not isinstance(source, ImageRef):
                yield content_key(source)
        except (DataError, OSError):
            yield "unreadable"
        return
