"""The undirected graph over rows whose edges join hard negatives of each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from b3.mining.hashing import mix64, uniform
from b3.mining.rank import TOP, WINDOW, Ranks
from b3.mining.vectors import DistinctTargets

EDGE_BLOCK = 1 << 22


@dataclass(frozen=True)
class Graph:
    """A symmetric graph without loops in compressed rows; the neighbours of i are ``indices[indptr[i]:indptr[i+1]]``.

    Attributes: indptr (N + 1,), indices (E,) ascending in a row, weights (E,), all int64; weights are 1 or 2.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        """Undirected edges."""
        return len(self.indices) // 2

    def degrees(self) -> np.ndarray:
        """(N,) int64: sum of the weights at each row."""
        total = np.concatenate([[0], np.cumsum(self.weights)])
        return total[self.indptr[1:]] - total[self.indptr[:-1]]

    def sources(self) -> np.ndarray:
        """(E,) int64: the row that each entry of `indices` is a neighbour of."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    def restrict(self, rows: np.ndarray) -> Graph:
        """The graph over `rows` (ascending), renumbered 0, 1, ..."""
        if len(rows) == len(self):
            return self
        number = np.full(len(self), -1, dtype=np.int64)
        number[rows] = np.arange(len(rows))
        sources, targets = number[self.sources()], number[self.indices]
        kept = (sources >= 0) & (targets >= 0)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(sources[kept], minlength=len(rows)))])
        return Graph(indptr.astype(np.int64), targets[kept], self.weights[kept])


def window_rows(ranks: Ranks, distinct: DistinctTargets, budget: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The directed edges of every query i to the rows that carry the targets of its window, own target left out.

    Up to `budget` such rows are all taken. Where there are more (targets shared by many rows), the rows are sampled so
    that about `budget` remain, whatever N is: the rows of each target are spread over a circle in a seeded order, each
    at its slot, and query i takes those within reach of its own slot, the reach being budget / number of rows. Rows
    near each other on the circle thus keep the full window structure among themselves, each target about once, as if a
    large data set were many small ones; independent sampling would thin all of it.

    Returns (indptr (N + 1,), rows (E,)), int64.
    """
    by_slot = _by_slot(distinct, seed)
    slots, phase = _slots(distinct, by_slot, seed)
    counts = distinct.counts
    offsets, found = [np.zeros(1, dtype=np.int64)], []
    step = max(1, EDGE_BLOCK // max(ranks.m, budget))
    for start in range(0, len(ranks.own), step):
        span = slice(start, start + step)
        window = ranks.window[span]
        size = np.where(window == ranks.own[span][:, None], 0, counts[window])
        total = size.sum(axis=1)
        reach = np.minimum(1.0, budget / np.maximum(total, 1))[:, None] / 2
        low = np.ceil((slots[span][:, None] - reach) * size - phase[window]).astype(np.int64)
        high = np.ceil((slots[span][:, None] + reach) * size - phase[window]).astype(np.int64)
        taken = np.where((total <= budget)[:, None], size, np.minimum(high - low, size)).ravel()
        base = np.repeat(np.cumsum(taken) - taken, taken)
        place = np.repeat(low.ravel(), taken) + np.arange(taken.sum()) - base
        place = place % np.repeat(size.ravel(), taken)
        found.append(by_slot[np.repeat(distinct.starts[window.ravel()], taken) + place])
        offsets.append(taken.reshape(window.shape).sum(axis=1))
    return np.cumsum(np.concatenate(offsets)), np.concatenate(found)


def _by_slot(distinct: DistinctTargets, seed: int) -> np.ndarray:
    """(N,) rows ordered by distinct target, then by a seeded hash: the order of the slots."""
    if distinct.all_distinct:
        return distinct.rows
    return np.lexsort((mix64(seed, 1, np.arange(len(distinct.of_row))), distinct.of_row))


def _slots(distinct: DistinctTargets, order: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(slot (N,) of each row on the circle [0, 1), phase (U,) of each target's first row)."""
    phase = uniform(mix64(seed, 2, np.arange(len(distinct))))
    target = distinct.of_row[order]
    slots = np.empty(len(order))
    slots[order] = (np.arange(len(order)) - distinct.starts[target] + phase[target]) / distinct.counts[target]
    return slots, phase


def build_graph(ranks: Ranks, distinct: DistinctTargets, edges: str, veto: bool, budget: int, seed: int) -> Graph:
    """Join rows i and j where one's target is in the window of the other.

    union: weight = number of directions that hold, 1 or 2, so that the weight inside a community is the number of
    window hits that it contains; with `veto` a pair is dropped if either ranks the other's target above p.
    mutual: both directions must hold (paper, section 3.2); weight 1; vetoes by itself.
    """
    from scipy import sparse

    assert edges in ("union", "mutual")
    count = len(ranks.own)
    indptr, rows = window_rows(ranks, distinct, budget, seed)
    directed = sparse.csr_array((np.ones(len(rows), dtype=np.int8), rows, indptr), shape=(count, count))
    # Row j of the transpose lists the i whose window holds j's target; the other direction is looked up there.
    back = directed.T.tocsr()
    sources = np.repeat(np.arange(count), np.diff(back.indptr))
    kinds = ranks.classify(sources, distinct.of_row[back.indices])
    if edges == "mutual":
        weights = (kinds == WINDOW).astype(np.int8)
    else:
        weights = np.where(kinds == WINDOW, 2, 1).astype(np.int8)
        if veto:
            weights[kinds == TOP] = 0
    back.data = weights
    back.eliminate_zeros()
    both = back.maximum(back.T.tocsr()).tocsr()
    both.sort_indices()
    return Graph(both.indptr.astype(np.int64), both.indices.astype(np.int64), both.data.astype(np.int64))
