"""Which rows make which batch: a pure function of (plan, seed, epoch).

Resuming is therefore indexing: a sampler started at step s gives batch s, s + 1, ... without replaying anything, and
every rank knows the exact number of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from b3.errors import InputError


class BatchPlanSampler(Sampler[list[int]]):
    """Batches of |B| / K communities of one data set, re-drawn every epoch.

    A row number counts over all data sets: row r of data set d is ``offsets[d] + r``. Communities that do not fill a
    last batch are left out for one epoch; since they are drawn anew, others are left out the next time.

    Args:
        plans: one per data set: a `BatchPlan`, or its communities (C, K) int64. Random batches are communities of one
            row each, see `random_rows`.
        sizes: rows of each data set, for the offsets; default: largest row number of its plan + 1.
        batch_size: |B| over all ranks, a multiple of every K and of `world_size`.
        seed: of the draw.
        steps: number of batches in all; None: one epoch (the one of `set_epoch`).
        start: first batch, counted from the beginning of training.
        rank, world_size: a rank takes the consecutive slice `rank` of each batch.

    Raises:
        InputError: |B| does not fit K, the ranks, or the rows of a data set.
    """

    def __init__(
        self,
        plans: Any,
        batch_size: int,
        *,
        sizes: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
        steps: int | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        plans = plans if isinstance(plans, (list, tuple)) else [plans]
        self.communities = [np.asarray(getattr(plan, "communities", plan), dtype=np.int64) for plan in plans]
        sizes = sizes or [int(c.max()) + 1 for c in self.communities]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.names = list(names) if names else [f"data set {d}" for d in range(len(plans))]
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._cached: tuple[int, list[np.ndarray]] | None = None
        if batch_size % world_size:
            raise InputError(f"batch size {batch_size} does not divide over {world_size} ranks")
        self.per_epoch_of = [self._batches_of(d) for d in range(len(self.communities))]

    def _batches_of(self, dataset: int) -> int:
        count, size = self.communities[dataset].shape
        if self.batch_size % size:
            raise InputError(f"batch size {self.batch_size} is not a multiple of the community size {size}")
        if count * size < self.batch_size:
            raise InputError(
                f"{self.names[dataset]} has {count * size} rows in communities, fewer than the batch size"
                f" {self.batch_size}; reduce batch.size or drop the data set"
            )
        return count * size // self.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return sum(self.per_epoch_of)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (only without `steps`)."""
        self.epoch = epoch

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch in order, each (|B|,) int64 row numbers over all data sets."""
        if self._cached is None or self._cached[0] != epoch:
            batches: list[np.ndarray] = []
            for dataset, communities in enumerate(self.communities):
                order = np.random.default_rng([self.seed, epoch, dataset]).permutation(len(communities))
                group = self.batch_size // communities.shape[1]
                usable = order[: self.per_epoch_of[dataset] * group]
                rows = communities[usable].reshape(-1, self.batch_size) + self.offsets[dataset]
                batches.extend(rows)
            shuffled = np.random.default_rng([self.seed, epoch, len(self.communities)]).permutation(len(batches))
            self._cached = (epoch, [batches[i] for i in shuffled])
        return self._cached[1]

    def batch(self, step: int) -> np.ndarray:
        """The whole batch of a step counted from the beginning of training: (|B|,) int64."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self.epoch_batches(epoch)[index]

    def dataset_of(self, row: int) -> tuple[int, int]:
        """(data set, row in it) of a row number."""
        dataset = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return dataset, int(row - self.offsets[dataset])

    def __len__(self) -> int:
        return self.batches_per_epoch if self.steps is None else max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        first = self.epoch * self.batches_per_epoch if self.steps is None else self.start
        for step in range(first, first + len(self)):
            yield self.batch(step)[self.rank * share : (self.rank + 1) * share].tolist()


def random_rows(num_rows: int) -> np.ndarray:
    """Communities (N, 1) of one row each: batches become random rows of the data set, the fair control."""
    return np.arange(num_rows, dtype=np.int64)[:, None]
