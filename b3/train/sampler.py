"""Which rows make which batch: a pure function of (plans, seed, step).

Resuming is therefore indexing: a sampler started at step s gives batch s, s + 1, ... without replaying anything, and
every rank knows the exact number of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

from b3 import distributed
from b3.config import Config
from b3.errors import InputError
from b3.train.pools import Epochs, Part, Pool

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan


class BatchPlanSampler(Sampler[list[Any]]):
    """Batches of |B| / K communities of one pool (by default one data set), re-drawn every epoch.

    For a `DataLoader` as its `batch_sampler`. With one plan each batch is a list of row numbers; with a list of plans,
    one per data set, a list of pairs (number of the data set, row number in it).

    Communities that do not fill a last batch, and rows in no community, rotate: after ``2 * C / n`` epochs, rounded
    up, with n of a data set's C communities used per epoch, each of its rows was used. See `b3.train.pools`.

    Args:
        plans: a `BatchPlan`, or its communities (C, K) int64; or a list of these, one per data set. Random batches are
            communities of one row each, see `random_rows`.
        names: of the data sets, for messages.
        batch_size: |B| over all ranks, a multiple of every K and of `world_size`.
        seed: of the draw.
        steps: number of batches in all; None: one epoch (the one of `set_epoch`).
        start: first batch, counted from the beginning of training.
        rank, world_size: a rank takes the consecutive slice `rank` of each batch.
        weights: how often the rows of each data set are seen, against 1; at most 1: no row twice in an epoch.
        pools: number of the pool of each data set; data sets of one pool share batches. Default: a pool each.
        frozen: every epoch has the batches of the first one in a new order.
        random_steps: so many steps at the start draw random rows of one data set, as plans of `random_rows` without
            `pools` would; the step after them has the first batch of the plans. None: all, until `begin_plans`.

    Raises:
        InputError: |B| does not fit K, the ranks, the rows of a data set or the weights.
    """

    def __init__(
        self,
        plans: Any,
        batch_size: int,
        *,
        names: Sequence[str] | None = None,
        seed: int = 0,
        steps: int | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
        pools: Sequence[int] | None = None,
        frozen: bool = False,
        random_steps: int | None = 0,
    ) -> None:
        if batch_size % world_size:
            raise InputError(f"batch size {batch_size} does not divide over {world_size} ranks")
        self.has_pairs = isinstance(plans, (list, tuple))
        plans = list(plans) if self.has_pairs else [plans]
        count = len(plans)
        self.names = list(names) if names else [f"data set {number}" for number in range(count)]
        self.batch_size, self.seed, self.steps, self.start = batch_size, seed, steps, start
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        pool_of = list(pools) if pools is not None else list(range(count))
        weights = list(weights) if weights is not None else [1.0] * count
        self.epochs = Epochs(self._pools(plans, weights, pool_of), seed, frozen)
        self.random_steps, self.random_epochs = random_steps, self.epochs
        if random_steps != 0:
            rows = [np.sort(np.concatenate([_communities(p).ravel(), _remainder(p)]))[:, None] for p in plans]
            self.random_epochs = Epochs(self._pools(rows, weights, range(count)), seed, frozen)

    def _pools(self, plans: Sequence[Any], weights: Sequence[float], pool_of: Sequence[int]) -> list[Pool]:
        parts: dict[int, list[Part]] = {}
        for number, plan in enumerate(plans):
            part = Part(self.names[number], number, _communities(plan), _remainder(plan), weights[number], self.seed)
            parts.setdefault(pool_of[number], []).append(part)
        return [Pool(parts[number], number, self.batch_size) for number in sorted(parts)]

    @property
    def pools(self) -> list[Pool]:
        """In the order of their numbers."""
        return self.epochs.pools

    @property
    def batches_per_epoch(self) -> int:
        return self.epochs.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration (only without `steps`)."""
        self.epoch = epoch

    def pools_at(self, step: int) -> list[Pool]:
        """Those whose batches a step may have."""
        return (self.random_epochs if self.random_steps is None or step < self.random_steps else self.epochs).pools

    def begin_plans(self, step: int) -> None:
        """Let the random batches end after so many steps, and the next iteration start there."""
        self.random_steps = self.start = step

    def batch(self, step: int) -> np.ndarray:
        """The whole batch of a step counted from the beginning of training: (|B|, 2) int64, data set and row."""
        if self.random_steps is None or step < self.random_steps:
            return self.random_epochs.batch(step)
        return self.epochs.batch(step - self.random_steps)

    def __len__(self) -> int:
        return self.batches_per_epoch if self.steps is None else max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[Any]]:
        share = self.batch_size // self.world_size
        of_rank = slice(self.rank * share, (self.rank + 1) * share)
        first = self.epoch * self.batches_per_epoch if self.steps is None else self.start
        for step in range(first, first + len(self)):
            pairs = self.batch(step)[of_rank]
            yield [(dataset, row) for dataset, row in pairs.tolist()] if self.has_pairs else pairs[:, 1].tolist()


def _communities(plan: Any) -> np.ndarray:
    return np.asarray(getattr(plan, "communities", plan), dtype=np.int64)


def _remainder(plan: Any) -> np.ndarray:
    return np.asarray(getattr(plan, "remainder", ()), dtype=np.int64)


def random_rows(num_rows: int) -> np.ndarray:
    """Communities (N, 1) of one row each: batches become random rows of the data set, the fair control."""
    return np.arange(num_rows, dtype=np.int64)[:, None]


def build_sampler(config: Config, datasets: list[PairDataset], plans: list[BatchPlan]) -> BatchPlanSampler:
    """Batches of this rank under the recipe's policy, from the first step on; `start` moves them to another."""
    batch, entries = config.batch, config.data.datasets
    random_steps = 0 if batch.policy == "random" else batch.random_steps
    return BatchPlanSampler(
        plans if batch.mined else [random_rows(len(dataset)) for dataset in datasets],
        batch.size,
        names=[dataset.name for dataset in datasets],
        seed=config.seed,
        steps=config.train.steps,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        weights=[entry.weight for entry in entries],
        pools=pool_numbers(config),
        frozen=config.mining.preset == "paper",
        random_steps=None if random_steps == "auto" else random_steps,
    )


def pool_numbers(config: Config) -> list[int]:
    """The pool of each data set: data sets of one pool share batches."""
    policy, entries = config.batch.policy, config.data.datasets
    if policy in ("b3_mixed", "random_mixed"):
        return [0] * len(entries)
    pools = list(range(len(entries)))
    if policy == "b3_merged":
        labelled = [number for number in pools if entries[number].family == "classification"]
        pools = [labelled[0] if number in labelled else number for number in pools]
    return pools
