"""Rankings of the targets for every query: exact, in blocks, ties broken by target number (see `b3.mining.search`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from b3.errors import InputError
from b3.mining.search import CellSearch, Search, exact_search, pair_scores
from b3.mining.vectors import DistinctTargets

Progress = Callable[[str, int, int], None]

NONE, WINDOW, TOP = 0, 1, 2
TEMPERATURE = 0.02
CLASSIFY_ROWS = 16384
RECALL_QUERIES = 1024


@dataclass(frozen=True)
class Rankings:
    """What mining needs to know of each query's ranking over the U distinct targets.

    Attributes:
        order: (N, p + m) int32, distinct targets by rank, best first; the query's own target is ranked too.
        p: ranks skipped.
        m: width of the window, at most U - p.
        own: (N,) int64, the query's own distinct target.
        positive: (N,) float64, score of the own target.
        best: (N,) float64, largest score from rank p on, own target excluded.
        mass: (N,) float64, sum of exp((score - best) / 0.02) over the `terms` largest scores from rank p on.
    """

    order: np.ndarray
    p: int
    m: int
    own: np.ndarray
    positive: np.ndarray
    best: np.ndarray
    mass: np.ndarray
    num_targets: int

    @cached_property
    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        """`order` (N, p + m) sorted by target, and whether each of its places is above the window, bool."""
        ids, is_top = np.empty_like(self.order), np.empty(self.order.shape, dtype=bool)
        for start in range(0, len(ids), CLASSIFY_ROWS):
            span = slice(start, start + CLASSIFY_ROWS)
            position = np.argsort(self.order[span], axis=1)
            ids[span] = np.take_along_axis(self.order[span], position, axis=1)
            is_top[span] = position < self.p
        return ids, is_top

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ("order", "own", "positive", "best", "mass")}

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

    def classify(self, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Where query ``rows[e]`` ranks distinct target ``targets[e]``: `TOP` (above p), `WINDOW` or `NONE`; int8.

        `rows` must not decrease; both (E,).
        """
        kinds = np.zeros(len(rows), dtype=np.int8)
        ids, is_top = self._by_id
        cuts = np.searchsorted(rows, np.arange(0, len(ids) + CLASSIFY_ROWS, CLASSIFY_ROWS))
        for block, (low, high) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            if low == high:
                continue
            span = slice(block * CLASSIFY_ROWS, (block + 1) * CLASSIFY_ROWS)
            # one sorted list of (query, target) for the block, in which all pairs are looked up at once
            part = ids[span]
            keys = (np.arange(len(part), dtype=np.int64)[:, None] * self.num_targets + part).ravel()
            sought = (rows[low:high] - span.start) * self.num_targets + targets[low:high]
            at = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
            kinds[low:high] = np.where(keys[at] == sought, np.where(is_top[span].ravel()[at], TOP, WINDOW), NONE)
        return kinds


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
        terms: number of largest scores from rank p on that enter `Rankings.mass` (K - 1).
        device: torch device that searches large inputs; default: a GPU if there is one.
        block_rows: queries a block; changes memory and speed, never the result.
        progress: called as ``progress("rank", rows done, rows)``.
        share: (i, n): only the i-th of n equal parts of the rows; `join_rankings` puts the parts together.
        method: "exact", or "ivf" (`b3.mining.search.CellSearch`).
    """
    num_targets = len(distinct)
    assert m > 0 and p >= 0 and p + m <= num_targets
    depth = min(num_targets, p + max(m, terms + 1))
    if method == "ivf":
        search: Search = CellSearch(distinct.vectors, depth)
        step = 1024
    else:
        search, step = exact_search(distinct.vectors, depth, device)
    if block_rows is not None and block_rows < 1:
        raise InputError(f"block_rows is {block_rows}; give an integer of at least 1")
    step = block_rows or step
    first, last = (len(queries) * k // share[1] for k in (share[0], share[0] + 1))
    count = last - first
    order = np.empty((count, p + m), dtype=np.int32)
    positive, best, mass = (np.zeros(count) for _ in range(3))
    for start in range(first, last, step):
        rows = slice(start, min(start + step, last))
        span = slice(rows.start - first, rows.stop - first)
        own = distinct.of_row[rows]
        ids, scores = search(queries[rows])
        order[span] = ids[:, : p + m]
        positive[span] = pair_scores(queries[rows], distinct.vectors[own][:, None])[:, 0]
        best[span], mass[span] = _eligible_mass(ids[:, p:] != own[:, None], scores[:, p:], terms)
        if progress:
            progress("rank", span.stop, count)
    return Rankings(order, p, m, distinct.of_row[first:last], positive, best, mass, num_targets)


def join_rankings(parts: list[Rankings]) -> Rankings:
    """The rankings of all rows from those of consecutive parts."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    joined = {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays}
    return Rankings(p=first.p, m=first.m, num_targets=first.num_targets, **joined)


def search_recall(queries: np.ndarray, rankings: Rankings, distinct: DistinctTargets) -> float:
    """Share of the exact top p + m that an approximate search found, over `RECALL_QUERIES` evenly spaced queries."""
    rows = np.unique(np.linspace(0, len(queries) - 1, min(RECALL_QUERIES, len(queries))).astype(np.int64))
    exact, _ = exact_search(distinct.vectors, rankings.order.shape[1])[0](queries[rows])
    num_same = sum(len(np.intersect1d(a, b)) for a, b in zip(exact, rankings.order[rows], strict=True))
    return num_same / exact.size


def _eligible_mass(eligible: np.ndarray, scores: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """(best, mass) of `Rankings` from scores (n, k) in rank order; `eligible` marks what is not the own target."""
    best = np.take_along_axis(scores, eligible.argmax(axis=1)[:, None], axis=1)
    kept = eligible & (np.cumsum(eligible, axis=1) <= terms)
    powers = np.exp(np.where(kept, scores - best, -np.inf) / TEMPERATURE)
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
    is_kept = rankings.order != rankings.own[:, None]
    is_kept[is_kept.all(axis=1), -1] = False  # the own label is beyond the last rank: drop that rank instead
    return replace(rankings, order=rankings.order[is_kept].reshape(len(is_kept), width), m=width)
