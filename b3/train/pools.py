"""What one epoch of batches is made of: pools of communities, walked through so that no row is forgotten.

Every part of a pool (a data set) keeps its communities on a wheel, a fixed random order. An epoch takes the next
stretch of it, so how often two communities were used never differs by more than one, whatever fits into whole batches.
In every other turn of the wheel the rows that are in no community take random places of one community, or of as many
as it needs. Batches are then drawn freshly from the stretch. All of it is a function of (communities, seed, epoch); the
random orders come from hashes and so depend on no library's generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from b3.errors import InputError
from b3.mining.vectors import mix64


class _Choice(IntEnum):
    """What a hash decides, so that no two choices share their randomness."""

    WHEEL = 1
    CEDING = 2
    PLACES = 3
    BATCHES = 4
    ORDER = 6


def _order(seed: int, choice: _Choice, *numbers: int, count: int) -> np.ndarray:
    """(count,) int64: the numbers below `count` in a random order that depends on the other arguments only."""
    hashes = mix64(seed, int(choice), *numbers, np.arange(count, dtype=np.int64))
    return np.argsort(hashes, kind="stable").astype(np.int64)


class Part:
    """The communities of one data set.

    Args:
        name: of the data set, for messages.
        number: of the data set; part of every hash.
        communities: (C, K) int64 row numbers.
        remainder: (R,) int64 rows in no community; K or more where subsets were mined on their own or a plan was
            imported, at most as many as are in communities.
        weight: how often the rows are seen, against 1.
        seed: of the random orders.

    Raises `InputError` if the remainder or the weight cannot be used.
    """

    def __init__(
        self, name: str, number: int, communities: np.ndarray, remainder: np.ndarray, weight: float, seed: int
    ) -> None:
        if len(remainder) > communities.size:
            raise InputError(
                f"{name} has {len(remainder)} rows in no community, more than the {communities.size} in communities;"
                " mine the plan again"
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"the weight {weight} of {name} must be a number above 0")
        self.name, self.number, self.weight, self.seed = name, number, weight, seed
        self.communities, self.remainder = communities, remainder
        self._wheel = _order(seed, _Choice.WHEEL, number, count=len(communities))

    @property
    def num_rows(self) -> int:
        return self.communities.size + len(self.remainder)

    def stretch(self, first: int, count: int) -> np.ndarray:
        """`count` <= C communities from position `first` of the endless walk round the wheel, distinct.

        Returns (count, K, 2) int64: number of the data set, row number in it.
        """
        size = len(self.communities)
        rows: np.ndarray = self.communities[self._wheel[np.arange(first, first + count) % size]]
        if len(self.remainder):
            for turn in range(first // size, (first + count - 1) // size + 1):
                if turn % 2 == 0:  # in odd turns everyone is in place, so no row stays away twice in a row
                    self._cede(rows, turn, first)
        return np.stack([np.full_like(rows, self.number), rows], axis=-1)

    def _cede(self, rows: np.ndarray, turn: int, first: int) -> None:
        """Put the remainder into places of `rows` (count, K), the communities from position `first` on, in place."""
        size, width = self.communities.shape
        slot = int(mix64(self.seed, int(_Choice.CEDING), self.number, turn)[0] % np.uint64(size))
        for number, start in enumerate(range(0, len(self.remainder), width)):
            newcomers = self.remainder[start : start + width]
            index = turn * size + (slot + number) % size - first  # of the community that makes room, in `rows`
            if 0 <= index < len(rows):
                places = _order(self.seed, _Choice.PLACES, self.number, turn, count=width)[: len(newcomers)]
                rows[index, places] = newcomers


class Pool:
    """Batches drawn from the communities of one or several data sets.

    An epoch consists of one or more passes; within a pass each community occurs at most once, hence each row. There is
    one pass unless a weight above 1 asks for more communities than there are.

    Args:
        parts: communities of one size.
        number: of the pool; part of every hash.
        batch_size: |B|.

    Raises:
        InputError: |B| does not fit the community size, the rows or the weights.
    """

    def __init__(self, parts: Sequence[Part], number: int, batch_size: int) -> None:
        self.parts, self.number, self.batch_size = list(parts), number, batch_size
        self.seed = parts[0].seed
        widths = {part.communities.shape[1] for part in parts}
        if len(widths) > 1:
            raise InputError(f"{self.name} have communities of different sizes ({', '.join(map(str, sorted(widths)))})")
        self.width = widths.pop()
        if batch_size % self.width:
            raise InputError(f"batch size {batch_size} is not a multiple of the community size {self.width}")
        self.group = batch_size // self.width
        self.num_batches = self._count_batches()
        self.passes = self._split_into_passes(self._counts())

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    def _count_batches(self) -> int:
        rows = sum(part.communities.size for part in self.parts)
        if rows < self.batch_size:
            raise InputError(
                f"{self.name} has {rows} rows in communities, fewer than the batch size"
                f" {self.batch_size}; reduce batch.size or drop the data set"
            )
        num_batches = math.floor(sum(part.weight * part.num_rows for part in self.parts) / self.batch_size + 0.5)
        if all(part.weight <= 1 for part in self.parts):
            num_batches = min(num_batches, rows // self.batch_size)
        return max(1, num_batches)

    def _counts(self) -> np.ndarray:
        """(parts,) int64: communities of each part in an epoch; those of weight <= 1 are taken at most once."""
        total = self.num_batches * self.group
        sizes = np.array([len(part.communities) for part in self.parts])
        weights = np.array([part.weight for part in self.parts])
        limits = np.where(weights > 1, sizes * self.num_batches, sizes)
        ideal = weights * sizes * (total / float((weights * sizes).sum()))
        if total < len(self.parts):
            raise InputError(
                f"{self.name} share {total} communities per epoch, fewer than one each; raise their weights, or reduce"
                " batch.size"
            )
        if total > limits.sum() or (ideal > limits + 1)[weights > 1].any():
            worst = self.parts[int(np.argmax(ideal / limits))]
            raise InputError(
                f"weight {worst.weight:g} of {worst.name} would put a row twice into one of the {self.num_batches}"
                f" batches per epoch of {self.name}; lower it, or reduce batch.size"
            )
        return apportion(total, ideal, np.ones_like(sizes), limits)

    def _split_into_passes(self, counts: np.ndarray) -> np.ndarray:
        """(passes, parts) int64: communities of each part in each pass, no more than it has, in whole batches."""
        sizes = np.array([len(part.communities) for part in self.parts])
        passes = max(int((-(-counts // sizes)).max()), -(-self.num_batches // (int(sizes.sum()) // self.group)))
        while True:
            table = self._try_passes(min(passes, self.num_batches), counts, sizes)
            if table is not None:
                return table
            assert passes < self.num_batches, "passes of one batch each always work"
            passes += max(1, passes // 4)

    def _try_passes(self, passes: int, counts: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
        """The table of so many passes, batches spread evenly over them; None if some pass cannot be filled."""
        table, rest = np.zeros((passes, len(counts)), dtype=np.int64), counts.copy()
        edges = np.arange(passes + 1) * self.num_batches // passes
        for index, batches in enumerate(np.diff(edges)):
            after = passes - index - 1
            # a part must take what the later passes cannot, and has no more than its communities
            lower, upper = np.maximum(0, rest - sizes * after), np.minimum(rest, sizes)
            total = int(batches) * self.group
            if (lower > upper).any() or not lower.sum() <= total <= upper.sum():
                return None
            table[index] = apportion(total, rest / (after + 1), lower, upper)
            rest -= table[index]
        return table

    def epoch(self, epoch: int) -> np.ndarray:
        """All batches of an epoch: (batches, |B|, 2) int64, data set and row."""
        starts = epoch * self.passes.sum(axis=0) + np.cumsum(self.passes, axis=0) - self.passes
        batches = []
        for index, (counts, firsts) in enumerate(zip(self.passes, starts, strict=True)):
            stretches = [
                part.stretch(int(first), int(count))
                for part, first, count in zip(self.parts, firsts, counts, strict=True)
                if count
            ]
            batches.append(self._draw(np.concatenate(stretches), epoch, index))
        return np.concatenate(batches)

    def _draw(self, communities: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Batches (b, |B|, 2) from b * |B| / K communities (C, K, 2)."""
        order = _order(self.seed, _Choice.BATCHES, self.number, epoch, index, count=len(communities))
        return communities[order].reshape(-1, self.batch_size, 2)


def apportion(total: int, ideal: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Whole numbers near `ideal` (n,) float64, within [`lower`, `upper`] (n,) int64, that sum to `total`: (n,) int64.

    Largest remainders first, ties to the first; the bounds must leave room for `total`.
    """
    assert lower.sum() <= total <= upper.sum()
    result = np.clip(np.floor(ideal).astype(np.int64), lower, upper)
    while (missing := total - int(result.sum())) != 0:
        if missing > 0:
            result[np.argmax(np.where(result < upper, ideal - result, -np.inf))] += 1
        else:
            result[np.argmax(np.where(result > lower, result - ideal, -np.inf))] -= 1
    return result


class Epochs:
    """The endless sequence of batches of one set of plans: epoch after epoch, each in an order of its own.

    Args:
        pools: of one batch size.
        seed: of the order of batches.
        frozen: every epoch has the batches of the first one; only their order changes.
    """

    def __init__(self, pools: Sequence[Pool], seed: int, frozen: bool = False) -> None:
        self.pools, self.seed, self.frozen = list(pools), seed, frozen
        self._cached: tuple[int, np.ndarray] | None = None

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return sum(pool.num_batches for pool in self.pools)

    def epoch(self, epoch: int) -> np.ndarray:
        """(batches, |B|, 2) int64 data sets and rows, in order."""
        if self._cached is None or self._cached[0] != epoch:
            batches = np.concatenate([pool.epoch(0 if self.frozen else epoch) for pool in self.pools])
            self._cached = epoch, batches[_order(self.seed, _Choice.ORDER, epoch, count=len(batches))]
        return self._cached[1]

    def batch(self, index: int) -> np.ndarray:
        """The batch `index` counted from the first epoch: (|B|, 2) int64."""
        epoch, within = divmod(index, self.num_batches)
        batch: np.ndarray = self.epoch(epoch)[within]
        return batch
