"""Items to vectors: each distinct item once, sorted by length, in batches of a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.data.records import Item, as_item
from b3.progress import bar

if TYPE_CHECKING:
    from b3.model.embedder import Embedder
    from b3.model.processing import Processed

BATCH_TOKENS = 8192


def unique_items(items: Iterable[Item]) -> tuple[list[Item], np.ndarray]:
    """(distinct items in first-seen order, (N,) int64 index of each input into them)."""
    seen: dict[tuple[str, str], int] = {}
    distinct: list[Item] = []
    index = []
    for item in items:
        key = item.key
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(item)
        index.append(seen[key])
    return distinct, np.asarray(index, dtype=np.int64)


def token_batches(
    lengths: Sequence[int] | np.ndarray, batch_tokens: int, max_items: int | None = None
) -> list[np.ndarray]:
    """Positions grouped so that rows x longest row <= `batch_tokens` (a single longer row stands alone).

    Rows of similar length share a batch; ties keep their order, so the grouping is a pure function of the lengths.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    batches, start = [], 0
    while start < len(order):
        room = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        size = min(room, max_items or room)
        batches.append(order[start : start + size])
        start += size
    return batches


def encode_items(
    embedder: Embedder,
    items: Sequence[Item | dict[str, Any] | str],
    normalize: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    max_items: int | None = None,
    window: int = 4096,
    progress: str | None = None,
) -> np.ndarray:
    """Vectors (N, D) float32 of `items`, in their order.

    Args:
        batch_tokens: upper bound on rows x longest row of one forward pass.
        max_items: upper bound on the rows of one forward pass.
        window: items that are decoded and sorted by length at a time; bounds memory.
        progress: label of a progress bar; None shows none.

    Raises:
        DataError: an item is empty, or its image is missing, does not decode or lacks its token.
    """
    import torch

    from b3.model.embedder import collate

    distinct, index = unique_items(as_item(item) for item in items)
    vectors = np.empty((len(distinct), embedder.dim), dtype=np.float32)
    was_training = embedder.training
    embedder.eval()
    try:
        with torch.inference_mode(), bar(len(distinct), progress, "item") as shown:
            for rows, processed in _windows(embedder.processor, distinct, window):
                for batch in token_batches([p.num_tokens for p in processed], batch_tokens, max_items):
                    inputs = collate([processed[i] for i in batch]).to(embedder.device)
                    vectors[rows.start + batch] = embedder(inputs, normalize=normalize).cpu().numpy()
                    shown.update(len(batch))
    finally:
        embedder.train(was_training)
    return vectors[index]


def _windows(
    processor: Callable[[Item], Processed], items: list[Item], size: int
) -> Iterator[tuple[range, list[Processed]]]:
    for start in range(0, len(items), size):
        rows = range(start, min(start + size, len(items)))
        yield rows, [processor(items[row]) for row in rows]
