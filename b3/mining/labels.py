"""Classification as the paper's scripts mine it: by the nearest labels, in subsets of the rows.

Row ranks say nothing where many rows share a label. The authors' code takes, for each query, the first 30 % of all
labels in rank order, the gold one left out, joins the query with every row of its subset that carries one of them, and
keeps the edges that hold both ways. The graph is dense (thousands of edges a row), hence their subsets of 10,000 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from b3.errors import InputError
from b3.mining.graph import Graph
from b3.mining.hashing import mix64
from b3.mining.rankings import Ranks
from b3.mining.vectors import DistinctTargets

BLOCK_VALUES = 1 << 24
MAX_EDGES = 200_000_000  # directed; 5 bytes each, and three times that while built

RankTo = Callable[[np.ndarray, DistinctTargets, int, int], Ranks]  # (queries, targets, p, m)


def label_count(num_labels: int) -> int:
    """30 % of the labels, rounded up."""
    return -(-3 * num_labels // 10)


def rank_labels(units: np.ndarray, distinct: DistinctTargets, width: int, rank: RankTo) -> Ranks:
    """The first `width` labels of each query, its own left out (p = 0), clipped to the U - 1 that exist."""
    width = min(width, len(distinct) - 1)
    ranks = rank(units, distinct, 0, width + 1)
    kept = ranks.order != ranks.own[:, None]
    kept[kept.all(axis=1), -1] = False
    return replace(ranks, order=ranks.order[kept].reshape(len(kept), width), m=width)


def split_rows(num_rows: int, subset_rows: int | None, seed: int) -> list[np.ndarray]:
    """The rows in random subsets of `subset_rows` (the last one smaller), each ascending; None: all in one."""
    order = np.argsort(mix64(seed, 8, np.arange(num_rows)), kind="stable")
    return [np.sort(order[s : s + (subset_rows or num_rows)]) for s in range(0, num_rows, subset_rows or num_rows)]


def restrict_targets(distinct: DistinctTargets, rows: np.ndarray) -> DistinctTargets:
    """The distinct targets of `rows` (ascending), renumbered in the same order."""
    present, of_row = np.unique(distinct.of_row[rows], return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=len(present)))])
    by_target = np.argsort(of_row, kind="stable").astype(np.int64)
    return DistinctTargets(distinct.vectors[present], of_row.astype(np.int64), by_target, starts.astype(np.int64))


def label_graph(ranks: Ranks, distinct: DistinctTargets) -> Graph:
    """Join rows of which each has the other's label among its own `ranks` (of `rank_labels`); weight 1.

    Raises `InputError` if the graph could have more than 200 million directed edges.
    """
    labels, count = distinct.of_row, len(ranks.own)
    near = np.zeros((count, len(distinct)), dtype=bool)
    np.put_along_axis(near, ranks.order.astype(np.int64), True, axis=1)
    most = int((near @ distinct.counts.astype(np.float64)).sum())
    if most > MAX_EDGES:
        raise InputError(
            f"{count} rows and {len(distinct)} labels give up to {most:,} edges by label, above the limit of"
            f" {MAX_EDGES:,}; mine in subsets of 10000 rows (mining.classification_subset) or by distinct targets"
        )
    degrees, found = [], []
    step = max(1, BLOCK_VALUES // count)
    for start in range(0, count, step):
        span = slice(start, start + step)
        mutual = near[span][:, labels] & near[:, labels[span]].T
        degrees.append(mutual.sum(axis=1))
        found.append(np.nonzero(mutual)[1].astype(np.int32))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(degrees))]).astype(np.int64)
    indices = np.concatenate(found)
    return Graph(indptr, indices, np.ones(len(indices), dtype=np.int8))


def merge_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of several subsets together: sums, smallest and largest parts; gains pass by pass."""
    merged: dict[str, Any] = {}
    for facts in parts:
        for key, value in facts.items():
            if key not in merged:
                merged[key] = value
            elif isinstance(value, list):
                length = max(len(value), len(merged[key]))
                padded = [values + [0] * (length - len(values)) for values in (merged[key], value)]
                merged[key] = [a + b for a, b in zip(*padded, strict=True)]
            elif key.endswith(("_min", "_max")):
                merged[key] = (min if key.endswith("_min") else max)(merged[key], value)
            else:
                merged[key] += value
    return merged
