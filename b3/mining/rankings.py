"""Rankings of the targets for every query: exact, in blocks, ties broken by target number (see `b3.mining.search`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from b3.console import Progress
from b3.errors import InputError
from b3.memory import room_for
from b3.mining.search import make_search, pair_scores
from b3.mining.vectors import DistinctTargets

TEMPERATURE = 0.02
RECALL_QUERIES = 1024


@dataclass(frozen=True)
class Rankings:
    """What mining needs to know of each query's ranking over the U distinct targets.

    Attributes:
        order: (N, p + m) int32, distinct targets by rank, best first; the query's own target is ranked too.
        p: ranks skipped.
        m: width of the window, at most U - p.
        target_ids: (N,) int64, the query's own distinct target.
        positive_scores: (N,) float64, score of the own target.
        best_scores: (N,) float64, largest score from rank p on, own target excluded.
        total_mass: (N,) float64, sum of exp((score - best) / 0.02) over the `terms` largest scores from rank p on, own
            target excluded.
    """

    order: np.ndarray
    p: int
    m: int
    target_ids: np.ndarray
    positive_scores: np.ndarray
    best_scores: np.ndarray
    total_mass: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def narrow(self, width: int) -> Rankings:
        """The same with the window [p, p + width); `width` is at most the one there is."""
        assert width <= self.m
        return self if width == self.m else replace(self, order=self.order[:, : self.p + width], m=width)

    def window(self, rows: slice | np.ndarray) -> np.ndarray:
        """(n, m) int32: distinct targets at ranks [p, p + m) of queries."""
        return self.order[rows, self.p :]

    def skipped(self, rows: slice | np.ndarray) -> np.ndarray:
        """(n, p) int32: distinct targets above the window of queries."""
        return self.order[rows, : self.p]

    def rank_of(self, rows: np.ndarray | int, targets: np.ndarray) -> np.ndarray:
        """int32, the rank at which query ``rows[e]`` has distinct target ``targets[e]``, counted from 0.

        -1 beyond rank p + m. `rows` and `targets` broadcast; the result has their common shape.
        """
        from b3.mining.search_kernels import rank_of

        row_ids, target_ids = np.broadcast_arrays(rows, targets)
        ranks: np.ndarray = rank_of(self.order, row_ids.ravel(), target_ids.ravel())
        return ranks.reshape(row_ids.shape)


def rank_targets(
    queries: np.ndarray,
    distinct: DistinctTargets,
    p: int,
    m: int,
    terms: int,
    device: str | None = None,
    block_rows: int | None = None,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    method: str = "exact",
) -> Rankings:
    """Rank all distinct targets for every query and keep ranks [0, p + m).

    Args:
        queries: (N, D) float32 on the grid; row i belongs to target ``distinct.of_row[i]``.
        distinct: the U distinct targets.
        p, m: the window [p, p + m); p + m <= U.
        terms: number of largest scores that enter `Rankings.total_mass` (K - 1).
        device: torch device that searches large inputs; default: a GPU if there is one.
        block_rows: queries per block; changes memory and speed, never the result.
        progress: called as ``progress("rank", rows done, rows)``.
        share: (i, n): only the i-th of n equal parts of the rows; `join_rankings` puts the parts together.
        method: "exact", or "ivf" (`b3.mining.search.CellSearch`).
    """
    num_targets = len(distinct)
    assert m > 0 and p >= 0 and p + m <= num_targets
    if block_rows is not None and block_rows < 1:
        raise InputError(f"block_rows is {block_rows}; give an integer of at least 1")
    depth = min(num_targets, p + max(m, terms + 1))
    search, step = make_search(distinct.vectors, depth, method, device)
    step = block_rows or step
    first, last = (len(queries) * k // share[1] for k in (share[0], share[0] + 1))
    count = last - first
    order = room_for((count, p + m), np.int32)
    positive_scores, best_scores, total_mass = (np.zeros(count) for _ in range(3))
    for start in range(first, last, step):
        rows = slice(start, min(start + step, last))
        span = slice(rows.start - first, rows.stop - first)
        target_ids = distinct.of_row[rows]
        ids, scores = search(queries[rows])
        order[span] = ids[:, : p + m]
        positive_scores[span] = pair_scores(queries[rows], distinct.vectors[target_ids][:, None])[:, 0]
        is_other = ids[:, p:] != target_ids[:, None]
        best_scores[span], total_mass[span] = _mass(is_other, scores[:, p:], terms)
        if progress:
            progress("rank", span.stop, count)
    return Rankings(order, p, m, distinct.of_row[first:last], positive_scores, best_scores, total_mass)


def join_rankings(parts: list[Rankings]) -> Rankings:
    """The rankings of all rows from those of consecutive parts."""
    joined: dict[str, Any] = {key: np.concatenate([part.arrays[key] for part in parts]) for key in parts[0].arrays}
    return replace(parts[0], **joined)


def search_recall(queries: np.ndarray, rankings: Rankings, distinct: DistinctTargets) -> float:
    """Share of the exact top p + m that an approximate search found, over `RECALL_QUERIES` evenly spaced queries."""
    rows = np.unique(np.linspace(0, len(queries) - 1, min(RECALL_QUERIES, len(queries))).astype(np.int64))
    exact, _ = make_search(distinct.vectors, rankings.order.shape[1])[0](queries[rows])
    num_same = sum(len(np.intersect1d(a, b)) for a, b in zip(exact, rankings.order[rows], strict=True))
    return num_same / exact.size


def _mass(is_other: np.ndarray, scores: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """(best score, mass) of `Rankings`, each (n,), from scores (n, k) in rank order.

    `is_other` (n, k) marks what is not the own target.
    """
    best = np.take_along_axis(scores, is_other.argmax(axis=1)[:, None], axis=1)
    is_term = is_other & (np.cumsum(is_other, axis=1) <= terms)
    powers = np.exp(np.where(is_term, scores - best, -np.inf) / TEMPERATURE)  # relative: exp must not overflow
    return best[:, 0], powers.sum(axis=1)


def label_count(num_labels: int) -> int:
    """30 % of the labels, rounded up: the window of the authors' code for classification."""
    return -(-3 * num_labels // 10)


def rank_labels(queries: np.ndarray, distinct: DistinctTargets, width: int, terms: int, **how: Any) -> Rankings:
    """The first `width` labels of each query, its own left out (p = 0), clipped to the U - 1 that exist.

    Args: as of `rank_targets`, whose `device`, `block_rows`, `progress`, `share` and `method` may be given.
    """
    width = min(width, len(distinct) - 1)
    rankings = rank_targets(queries, distinct, 0, width + 1, terms, **how)
    is_other = rankings.order != rankings.target_ids[:, None]
    is_other[is_other.all(axis=1), -1] = False  # the own label is beyond the last rank: drop that rank instead
    return replace(rankings, order=rankings.order[is_other].reshape(len(rankings), width), m=width)
