"""Ranks of the targets for every query: exact, in blocks, ties broken by target number.

Scores are exact (`b3.mining.vectors`), so the ranks are the same for any block size, thread count or device. Large
inputs are searched in float32 first; what that search cannot decide, given the worst rounding error of a float32 dot
product, is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from b3.mining.vectors import DistinctTargets

Progress = Callable[[str, int, int], None]

NONE, WINDOW, TOP = 0, 1, 2
TEMPERATURE = 0.02
SMALL = 6000  # up to this many distinct targets the float64 product alone is as fast and loads no other library
SCORES_IN_BLOCK = 1 << 24
CLASSIFY_ROWS = 16384


@dataclass(frozen=True)
class Ranks:
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

    def __post_init__(self) -> None:
        position = np.argsort(self.order, axis=1)
        object.__setattr__(self, "_sorted", np.take_along_axis(self.order, position, axis=1))
        object.__setattr__(self, "_top", position < self.p)

    @property
    def window(self) -> np.ndarray:
        """(N, m) int32: distinct targets at ranks [p, p + m)."""
        return self.order[:, self.p :]

    def classify(self, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Where query ``rows[e]`` ranks distinct target ``targets[e]``: `TOP` (above p), `WINDOW` or `NONE`; int8.

        `rows` must not decrease; both (E,).
        """
        kinds = np.zeros(len(rows), dtype=np.int8)
        ids: np.ndarray = self._sorted  # type: ignore[attr-defined]
        top: np.ndarray = self._top  # type: ignore[attr-defined]
        cuts = np.searchsorted(rows, np.arange(0, len(ids) + CLASSIFY_ROWS, CLASSIFY_ROWS))
        for block, (low, high) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            if low == high:
                continue
            span = slice(block * CLASSIFY_ROWS, (block + 1) * CLASSIFY_ROWS)
            part = ids[span]
            keys = (np.arange(len(part), dtype=np.int64)[:, None] * self.num_targets + part).ravel()
            wanted = (rows[low:high] - span.start) * self.num_targets + targets[low:high]
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            kinds[low:high] = np.where(keys[at] == wanted, np.where(top[span].ravel()[at], TOP, WINDOW), NONE)
        return kinds


def rank_targets(
    queries: np.ndarray,
    distinct: DistinctTargets,
    p: int,
    m: int,
    terms: int,
    device: str = "cpu",
    block_rows: int | None = None,
    progress: Progress | None = None,
) -> Ranks:
    """Rank all distinct targets for every query and keep ranks [0, p + m).

    Args:
        queries: (N, D) float32 on the grid; row i belongs to target ``distinct.of_row[i]``.
        distinct: the U distinct targets.
        p, m: the window [p, p + m); p + m <= U.
        terms: number of largest scores from rank p on that enter `Ranks.mass` (K - 1).
        device: where torch searches large inputs.
        block_rows: queries a block; changes memory and speed, never the result.
        progress: called as ``progress("rank", rows done, rows)``.
    """
    count, num_targets = len(queries), len(distinct)
    assert m > 0 and p >= 0 and p + m <= num_targets
    depth = min(num_targets, p + max(m, terms + 1))
    search = _search(distinct.vectors, depth, device)
    block_rows = block_rows or max(1, min(4096, SCORES_IN_BLOCK // num_targets))
    order = np.empty((count, p + m), dtype=np.int32)
    positive, best, mass = (np.zeros(count) for _ in range(3))
    for start in range(0, count, block_rows):
        span = slice(start, min(start + block_rows, count))
        own = distinct.of_row[span]
        ids, scores = search(queries[span])
        order[span] = ids[:, : p + m]
        positive[span] = pair_scores(queries[span], distinct.vectors[own][:, None])[:, 0]
        best[span], mass[span] = _eligible_mass(ids[:, p:] != own[:, None], scores[:, p:], terms)
        if progress:
            progress("rank", span.stop, count)
    return Ranks(order, p, m, distinct.of_row, positive, best, mass, num_targets)


def _eligible_mass(eligible: np.ndarray, scores: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """(best, mass) of `Ranks` from scores (n, k) in rank order; `eligible` marks what is not the own target."""
    best = np.take_along_axis(scores, eligible.argmax(axis=1)[:, None], axis=1)
    kept = eligible & (np.cumsum(eligible, axis=1) <= terms)
    powers = np.exp(np.where(kept, scores - best, -np.inf) / TEMPERATURE)
    return best[:, 0], powers.sum(axis=1)


def pair_scores(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Exact scores (n, k) float64 of queries (n, D) with their own targets (n, k, D), both on the grid."""
    return np.matmul(targets.astype(np.float64), queries.astype(np.float64)[:, :, None])[:, :, 0]


def _search(targets: np.ndarray, depth: int, device: str) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function from queries (n, D) to (ids (n, depth), exact scores (n, depth)) in rank order."""
    if len(targets) <= SMALL:
        wide = targets.astype(np.float64).T
        return lambda queries: _select(queries.astype(np.float64) @ wide, depth)
    return _FilteredSearch(targets, depth, device)


def _select(scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best of each row of scores (n, U), ties by column."""
    num = scores.shape[1]
    bound = np.partition(scores, num - depth, axis=1)[:, num - depth]
    rows, columns = np.nonzero(scores >= bound[:, None])  # at least `depth` a row, more where the last ones tie
    values = scores[rows, columns]
    order = np.lexsort((columns, -values, rows))
    starts = np.searchsorted(rows, np.arange(len(scores)))
    kept = order[starts[:, None] + np.arange(depth)]
    return columns[kept], values[kept]


class _FilteredSearch:
    """Search in float32 with torch, then exact scores for the candidates.

    A float32 dot product of unit vectors is off by at most e = D 2**-24, for any order of summation (Higham 2002,
    section 3.1). With f the depth-th best float32 score, all true members score at least f - 2e in float32; a row
    whose last candidate is below that has them all. The other rows are computed in full.
    """

    def __init__(self, targets: np.ndarray, depth: int, device: str) -> None:
        import torch

        self.targets, self.depth = targets, depth
        self.width = min(len(targets), depth + 16 + depth // 8)
        self.margin = 2.02 * (targets.shape[1] + 4) * 2.0**-24
        self.device = torch.device(device)
        self.on_device = torch.from_numpy(targets).to(self.device)

    def __call__(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            block = torch.from_numpy(np.ascontiguousarray(queries)).to(self.device)
            found = torch.topk(block @ self.on_device.T, self.width, dim=1)
            rough, columns = found.values.cpu().numpy(), found.indices.cpu().numpy()
        ids = np.sort(columns, axis=1)
        scores = np.empty(ids.shape)
        step = max(1, SCORES_IN_BLOCK // (self.width * queries.shape[1]))
        for start in range(0, len(queries), step):
            span = slice(start, start + step)
            scores[span] = pair_scores(queries[span], self.targets[ids[span]])
        by_rank = np.argsort(-scores, axis=1, kind="stable")[:, : self.depth]  # stable over sorted ids: ties by id
        ids, scores = np.take_along_axis(ids, by_rank, axis=1), np.take_along_axis(scores, by_rank, axis=1)
        if self.width < len(self.targets):
            undecided = np.flatnonzero(rough[:, -1] >= rough[:, self.depth - 1] - self.margin)
            step = max(1, SCORES_IN_BLOCK // len(self.targets))
            for start in range(0, len(undecided), step):
                part = undecided[start : start + step]
                ids[part], scores[part] = _select(self._all_scores(queries[part]), self.depth)
        return ids, scores

    def _all_scores(self, queries: np.ndarray) -> np.ndarray:
        """Exact scores (n, U); the targets are widened in pieces."""
        wide = queries.astype(np.float64)
        pieces = range(0, len(self.targets), 8192)
        return np.concatenate([wide @ self.targets[s : s + 8192].astype(np.float64).T for s in pieces], axis=1)
