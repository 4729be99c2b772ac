"""From row numbers to the inputs of a step: decoded, tokenised, deduplicated and cut into chunks. Runs in workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from b3.data.records import Item, PairDataset
from b3.encode import token_batches, unique_items
from b3.errors import DataError
from b3.model.embedder import collate
from b3.model.processing import Processed, Processor
from b3.train.gradcache import Chunk, StepInputs

StepRow = tuple[int, int] | tuple[int, int, Sequence[int]]  # data set, row, hard negatives drawn for the batch


class Rows(torch.utils.data.Dataset[StepRow]):
    """Row numbers over several data sets; an element is a `StepRow`, no data is read here."""

    def __init__(self, sizes: list[int]) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, row: int | tuple[int, Sequence[int]]) -> StepRow:
        number, *negatives = row if isinstance(row, tuple) else (row,)
        dataset = int(np.searchsorted(self.offsets, number, side="right")) - 1
        own = int(number - self.offsets[dataset])
        return (dataset, own, negatives[0]) if negatives else (dataset, own)


def item_id(item: Item) -> int:
    """64-bit id, equal for equal items on every rank."""
    digest = hashlib.sha256("\0".join(item.key).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


@dataclass(frozen=True)
class StepCollator:
    """Builds `StepInputs` from `StepRow`s.

    Args:
        datasets: in the order of the sampler.
        processor: items to inputs.
        chunk_tokens: tokens a chunk may hold.
        hard_negatives: per data set (N, h) int64 row numbers whose targets are negatives (-1: none), or None; where
            a row comes with negatives of its own, those count.
        share_duplicates: encode equal items of a rank once (right only without dropout).
    """

    datasets: list[PairDataset]
    processor: Processor
    chunk_tokens: int
    hard_negatives: list[np.ndarray] | None = None
    share_duplicates: bool = True

    def __call__(self, rows: list[StepRow]) -> StepInputs:
        queries = [self.datasets[d].query(row) for d, row, *_ in rows]
        targets: list[Item] = []
        valid: list[bool] = []
        for place in rows:
            for item, real in self._targets(place):
                targets.append(item)
                valid.append(real)
        items = queries + targets
        distinct, index = unique_items(items) if self.share_duplicates else (items, np.arange(len(items)))
        processed = [self._process(item) for item in distinct]
        groups = token_batches([p.num_tokens for p in processed], self.chunk_tokens)
        token = self.processor.image_token_id
        chunks = [
            Chunk(collate([processed[i] for i in group], token), torch.from_numpy(group.copy())) for group in groups
        ]
        return StepInputs(
            chunks,
            torch.from_numpy(index[: len(queries)]),
            torch.from_numpy(index[len(queries) :]),
            torch.tensor([item_id(item) for item in queries], dtype=torch.int64),
            torch.tensor([item_id(item) for item in targets], dtype=torch.int64),
            torch.tensor(valid, dtype=torch.bool),
            num_tokens=sum(p.num_tokens for p in processed),
        )

    def negatives_of(self, place: StepRow) -> Sequence[int]:
        """Row numbers whose targets are the hard negatives of a row, -1 for none: its own, or those of the plan."""
        if len(place) == 3:
            return place[2]
        if self.hard_negatives is None:
            return []
        negatives: list[int] = self.hard_negatives[place[0]][place[1]].tolist()
        return negatives

    def _targets(self, place: StepRow) -> list[tuple[Item, bool]]:
        """The positive and the hard negatives of a row; a missing negative is a copy of the positive, not valid."""
        pairs = self.datasets[place[0]]
        positive = pairs.target(place[1])
        negatives = self.negatives_of(place)
        return [(positive, True), *((pairs.target(n), True) if n >= 0 else (positive, False) for n in negatives)]

    def _process(self, item: Item) -> Processed:
        try:
            return self.processor(item)
        except DataError as error:
            raise DataError(f"training row: {error}") from None
