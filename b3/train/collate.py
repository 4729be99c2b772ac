"""From row numbers to the inputs of a step: decoded, tokenised, deduplicated and cut into chunks. Runs in workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from b3.data.datasets import PairDataset
from b3.data.items import Item, item_id
from b3.errors import DataError
from b3.model.batch import Processor, token_batches
from b3.model.encode import unique_items
from b3.train.inputs import Pictures, StepInputs

StepRow = tuple[int, int]  # number of the data set, row number in it


@dataclass
class _Packed:
    """Processed items of a batch: each distinct picture once."""

    ids: list[np.ndarray] = field(default_factory=list)
    picture_of: list[int] = field(default_factory=list)
    patches: list[np.ndarray] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)

    def pictures(self, table: np.ndarray) -> Pictures | None:
        if not self.grids:
            return None
        return Pictures(
            torch.from_numpy(np.concatenate(self.patches)),
            torch.tensor([(1, *grid) for grid in self.grids], dtype=torch.int64),
            torch.from_numpy(table),
        )


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
    """

    datasets: list[PairDataset]
    processor: Processor
    chunk_tokens: int
    hard_negatives: list[np.ndarray] | None = None
    stored_negatives: int = 0
    share_duplicates: bool = True
    teachers: list[tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(self, rows: list[StepRow]) -> StepInputs:
        queries = [self.datasets[number].query(row) for number, row in rows]
        columns = [column for place in rows for column in self._columns(place)]
        targets = [item for item, _ in columns]
        items = queries + targets
        distinct, index = unique_items(items) if self.share_duplicates else (items, np.arange(len(items)))
        packed = self._process(distinct)
        lengths = [len(ids) for ids in packed.ids]
        teacher_queries, teacher_targets = self._teacher(rows)
        return StepInputs(
            torch.from_numpy(np.concatenate(packed.ids)),
            lengths,
            packed.picture_of,
            packed.pictures(self.processor.byte_values),
            token_batches(lengths, self.chunk_tokens),
            self.processor.image_token_id,
            torch.from_numpy(index[: len(queries)]),
            torch.from_numpy(index[len(queries) :]),
            torch.tensor([item_id(item) for item in queries], dtype=torch.int64),
            torch.tensor([item_id(item) for item in targets], dtype=torch.int64),
            torch.tensor([real for _, real in columns], dtype=torch.bool),
            teacher_queries,
            teacher_targets,
        )

    def negative_items(self, place: StepRow) -> list[Item | None]:
        """The h hard negatives of a row, None where there are fewer: stored with it, or of its plan."""
        number, row = place
        dataset = self.datasets[number]
        if self.stored_negatives:
            found = dataset.negatives(row)[: self.stored_negatives]
            return [*found, *[None] * (self.stored_negatives - len(found))]
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

    def _process(self, items: list[Item]) -> _Packed:
        """Raises `DataError` naming the item that cannot be used."""
        packed, seen = _Packed(), dict[str, int]()
        for item in items:
            try:
                self.processor.check(item)
                number = self._picture(item, packed, seen)
                ids = self.processor.token_ids(item, None if number < 0 else packed.grids[number])
            except DataError as error:
                raise DataError(f"training row: {error}") from None
            packed.ids.append(ids)
            packed.picture_of.append(number)
        return packed

    def _picture(self, item: Item, packed: _Packed, seen: dict[str, int]) -> int:
        """Number of the item's picture, decoding it when it is new; -1 without."""
        if item.image is None:
            return -1
        key = item.image_key
        if key not in seen:
            image = item.open_image()
            assert image is not None
            patches, grid = self.processor.patch_bytes(image)
            seen[key] = len(packed.grids)
            packed.patches.append(patches)
            packed.grids.append(grid)
        return seen[key]
