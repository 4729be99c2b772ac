"""What a rank needs for one step, and how rows become it: decoded, tokenised, deduplicated and cut into chunks.

A `StepCollator` runs in workers and gives `StepInputs`: a few flat tensors, images as bytes, cheap to hand to the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3.data.datasets import PairDataset
from b3.data.items import Item, item_id
from b3.errors import DataError
from b3.model.batch import Batch, Processor, Tokens, Visual, join_patches, join_positions, token_batches
from b3.model.encode import unique_items

StepRow = tuple[int, int]  # number of the data set, row number in it


@dataclass(frozen=True, slots=True)
class Images:
    """Distinct images and videos.

    patches: (P, C, n) uint8 of all of them in order. grids: (media, 3) int64 (steps, rows, columns).
    num_features: tokens of each.
    """

    patches: Tensor
    grids: np.ndarray
    num_features: list[int]

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def sizes(self) -> list[int]:
        """Patches of each."""
        sizes: list[int] = self.grids.prod(axis=1).tolist()
        return sizes

    def select(self, numbers: Sequence[int]) -> Images:
        """Some of them, in this order."""
        edges = np.concatenate([[0], np.cumsum(self.sizes)])
        parts = [self.patches[edges[i] : edges[i + 1]] for i in numbers]
        patches = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Images(patches, self.grids[list(numbers)], [self.num_features[i] for i in numbers])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some of a rank's distinct items, as one forward pass takes them.

    batch: without patches. images: numbers of the items' images and videos, in the order of their slots.
    """

    batch: Batch
    images: list[int]


@dataclass(frozen=True)
class StepInputs:
    """One rank's share of a batch: b rows, each with a positive and h hard negatives.

    input_ids: (T,) int64 of the rank's distinct items, end to end. lengths: tokens of each.
    positions: (3, T) int64 of the tokens, or None: 0..L-1 in each item.
    is_slot: (T,) bool, tokens that stand for features.
    images_of: numbers of each item's images and videos in `images`.
    groups: (B,) int64 arrays of item numbers, one per chunk; every item is in exactly one.
    query_index: (b,) and target_index: (b (1 + h),) int64 positions among the distinct items.
    query_ids: (b,) and target_ids: (b (1 + h),) int64, equal for equal items.
    valid: (b (1 + h),) bool, False for padding.
    teacher_queries: (b, D) and teacher_targets: (b (1 + h), D), a teacher's vectors of the same rows, or None.
    temperatures: (b,) float64 of each row, known: (b, P) int64 ids of all targets that are right for a query, closed:
        (b,) bool, rows whose only negatives are their own; or None.
    """

    input_ids: Tensor
    lengths: list[int]
    positions: Tensor | None
    is_slot: Tensor
    images_of: list[list[int]]
    images: Images | None
    groups: list[np.ndarray]
    query_index: Tensor
    target_index: Tensor
    query_ids: Tensor
    target_ids: Tensor
    valid: Tensor
    teacher_queries: Tensor | None = None
    teacher_targets: Tensor | None = None
    temperatures: Tensor | None = None
    known: Tensor | None = None
    closed: Tensor | None = None

    @property
    def num_items(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_chunks(self) -> int:
        return len(self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, without their names and shapes."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        images = 0 if self.images is None else self.images.patches.nbytes + self.images.grids.nbytes
        return images + sum(tensor.nbytes for tensor in tensors)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def chunk(self, number: int) -> Chunk:
        """The inputs of one forward pass."""
        group, starts = self.groups[number], self._starts
        places = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group]))
        batch = Batch(
            self.input_ids[places],
            [self.lengths[i] for i in group],
            positions=None if self.positions is None else self.positions[:, places],
        )
        images = [number for i in group for number in self.images_of[i]]
        if images:
            assert self.images is not None
            slots = self.is_slot[places].nonzero()[:, 0]
            batch = replace(batch, grids=self.images.grids[images], slots=slots)
        return Chunk(batch, images)


@dataclass(frozen=True)
class StepCollator:
    """Builds `StepInputs` from pairs (data set, row).

    Args:
        datasets: in the order of the sampler.
        processor: items to inputs.
        chunk_tokens: tokens a chunk may hold.
        hard_negatives: per data set (N, h) int64 row numbers whose targets are negatives (-1: none), or None.
        stored_negatives: so many negatives of each row's own (`PairDataset.negatives`), in place of mined ones.
        share_duplicates: encode equal items of a rank once. With dropout they then share one random mask.
        teachers: per data set a teacher's (queries, targets), each (N, D) floats; None: no mask reads them.
        temperatures: per data set, in place of the loss's own; None: that.
        closed: per data set whether a row's only negatives are its own; None: of no data set.
        num_known: positives of the row that has most, over all data sets; 0: every row has one.
    """

    datasets: list[PairDataset]
    processor: Processor
    chunk_tokens: int
    hard_negatives: list[np.ndarray] | None = None
    stored_negatives: int = 0
    share_duplicates: bool = True
    teachers: list[tuple[np.ndarray, np.ndarray]] | None = None
    temperatures: list[float] | None = None
    closed: list[bool] | None = None
    num_known: int = 0

    def __call__(self, rows: list[StepRow]) -> StepInputs:
        queries = [self.datasets[number].query(row) for number, row in rows]
        columns = [column for place in rows for column in self._columns(place)]
        targets = [item for item, _ in columns]
        items = queries + targets
        distinct, index = unique_items(items) if self.share_duplicates else (items, np.arange(len(items)))
        tokens, images_of, images = self._process(distinct)
        lengths, positions = [len(one) for one in tokens], join_positions(tokens)
        teacher_queries, teacher_targets = self._teacher(rows)
        return StepInputs(
            input_ids=torch.from_numpy(np.concatenate([one.input_ids for one in tokens])),
            lengths=lengths,
            positions=None if positions is None else torch.from_numpy(positions),
            is_slot=torch.from_numpy(np.concatenate([np.isin(np.arange(len(one)), one.slots) for one in tokens])),
            images_of=images_of,
            images=images,
            groups=token_batches(lengths, self.chunk_tokens),
            query_index=torch.from_numpy(index[: len(queries)]),
            target_index=torch.from_numpy(index[len(queries) :]),
            query_ids=torch.tensor([item_id(item) for item in queries], dtype=torch.int64),
            target_ids=torch.tensor([item_id(item) for item in targets], dtype=torch.int64),
            valid=torch.tensor([is_valid for _, is_valid in columns], dtype=torch.bool),
            teacher_queries=teacher_queries,
            teacher_targets=teacher_targets,
            temperatures=_of_rows(self.temperatures, rows, torch.float64),
            known=self._known(rows),
            closed=_of_rows(self.closed, rows, torch.bool),
        )

    def _known(self, rows: list[StepRow]) -> Tensor | None:
        """(b, P) ids of the positives of each row, short rows filled up with the row's own target."""
        if not self.num_known:
            return None
        table = []
        for number, row in rows:
            ids = [item_id(item) for item in self.datasets[number].positives(row)]
            own = item_id(self.datasets[number].target(row))
            table.append(ids + [own] * (self.num_known - len(ids)))
        return torch.tensor(table, dtype=torch.int64)

    def negative_items(self, place: StepRow) -> list[Item | None]:
        """The h hard negatives of a row, None where there are fewer: stored with it, or of its plan."""
        number, row = place
        dataset = self.datasets[number]
        if self.stored_negatives:
            items = dataset.negatives(row)[: self.stored_negatives]
            return [*items, *[None] * (self.stored_negatives - len(items))]
        return [dataset.target(n) if n >= 0 else None for n in self._negative_rows(place)]

    def _negative_rows(self, place: StepRow) -> Sequence[int]:
        """Row numbers whose targets are the hard negatives of a row, -1 for none."""
        if self.hard_negatives is None:
            return []
        number, row = place
        negatives: list[int] = self.hard_negatives[number][row].tolist()
        return negatives

    def _columns(self, place: StepRow) -> list[tuple[Item, bool]]:
        """(target, valid) of a row's positive and its hard negatives; a missing one is a copy of the positive."""
        number, row = place
        positive = self.datasets[number].target(row)
        negatives = self.negative_items(place)
        return [(positive, True), *((positive, False) if item is None else (item, True) for item in negatives)]

    def _teacher(self, rows: list[StepRow]) -> tuple[Tensor | None, Tensor | None]:
        if self.teachers is None:
            return None, None
        assert not self.stored_negatives, "the teacher's vectors are those of rows"
        queries = np.stack([self.teachers[number][0][row] for number, row in rows])
        columns = [(place, n) for place in rows for n in (place[1], *self._negative_rows(place))]
        targets = np.stack([self.teachers[number][1][n if n >= 0 else row] for (number, row), n in columns])
        return torch.from_numpy(queries), torch.from_numpy(targets)

    def _process(self, items: list[Item]) -> tuple[list[Tokens], list[list[int]], Images | None]:
        """Tokens of each item, the numbers of its images and videos, and each distinct one of these once.

        Raises `DataError` naming the item that cannot be used.
        """
        tokens: list[Tokens] = []
        images_of: list[list[int]] = []
        numbers: dict[str, int] = {}
        visuals: list[Visual] = []
        for item in items:
            try:
                self.processor.check(item)
                media = self.processor.media(item)
                for medium in media:
                    if medium.key not in numbers:
                        visuals.append(self.processor.visual(medium))
                        numbers[medium.key] = len(visuals) - 1
                images_of.append([numbers[medium.key] for medium in media])
                tokens.append(self.processor.tokens(item, [visuals[number].grid for number in images_of[-1]]))
            except DataError as error:
                raise DataError(f"training row: {error}") from None
        if not visuals:
            return tokens, images_of, None
        patches = join_patches([visual.patches for visual in visuals])
        grids = np.asarray([visual.grid for visual in visuals], dtype=np.int64)
        counts = [self.processor.num_features(visual.grid) for visual in visuals]
        return tokens, images_of, Images(torch.from_numpy(patches), grids, counts)


def _of_rows(values: list[Any] | None, rows: list[StepRow], dtype: torch.dtype) -> Tensor | None:
    """(b,) what is given per data set, of each row."""
    return None if values is None else torch.tensor([values[number] for number, _ in rows], dtype=dtype)
