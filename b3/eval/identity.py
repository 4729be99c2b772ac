"""Whether the rows of a task are those that were scored: a digest of their texts and names, and one of some images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from b3.data.datasets import EvalDataset
from b3.data.items import Item
from b3.data.samples import images_digest
from b3.eval.ranked import RankedSet


def identity(dataset: EvalDataset | RankedSet) -> dict[str, str]:
    """{"rows", "images"}, equal for equal rows: all texts and names count, and some images by their bytes."""
    digest = hashlib.sha256()
    for part in _parts(dataset):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    images = images_digest(lambda row: _query(dataset, row), len(dataset))
    if isinstance(dataset, RankedSet):
        candidates = list(dataset.candidates.values())
        images += images_digest(candidates.__getitem__, len(candidates))
    else:
        images += images_digest(lambda row: dataset.candidates(row)[0], len(dataset))
    return {"rows": digest.hexdigest()[:32], "images": images}


def _query(dataset: EvalDataset | RankedSet, row: int) -> Item:
    return dataset.queries[row].item if isinstance(dataset, RankedSet) else dataset.query(row)


def _parts(dataset: EvalDataset | RankedSet) -> Iterator[str]:
    if isinstance(dataset, RankedSet):
        for query in dataset.queries:
            yield from (_text(query.item), str(query.info))
        for name, item in dataset.candidates.items():
            yield from (str(name), _text(item))
        return
    for row in range(len(dataset)):
        yield _text(dataset.query(row))
        for pair in dataset.raw_candidates(row):
            yield from pair


def _text(item: Item) -> str:
    return "\x1e".join((item.text or "", item.instruction or "", *(medium.name for medium in item.media)))
