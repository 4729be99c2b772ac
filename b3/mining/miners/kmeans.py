"""Balanced k-means by bisection: rows are split in two halves of exact size again and again.

Used as a partitioner of its own (communities of similar pairs, without rank windows) and to cut very large data sets
into pieces that are partitioned one by one. A row is represented by the unit vector of the sum of its query and its
target. All vectors lie on the grid of `b3.mining.vectors`, so that products and sums are exact and the result does not
depend on threads, libraries or the order of summation.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from b3.config.schema import MiningOptions
from b3.console import Clock
from b3.memory import room_for
from b3.mining.graph import Problem, kept_rows
from b3.mining.vectors import BLOCK_ROWS, GRID, DistinctTargets, mix64

ITERATIONS = 8


def cut(problem: Problem, options: MiningOptions, clock: Clock) -> np.ndarray:
    """(n,) int64 community of each row, -1 for the n mod K rows in none; every community has exactly K rows."""
    size, seed = options.community_size, options.seed
    positions = kept_rows(None, len(problem), size, seed)
    with clock.stage("partition"):
        vectors = pair_vectors(problem.queries, problem.distinct)
        communities = balanced_kmeans(vectors, problem.rows[positions], len(positions) // size, size, seed)
    return problem.place(positions, communities)


def pair_vectors(queries: np.ndarray, distinct: DistinctTargets) -> np.ndarray:
    """(N, D) float32 on the grid: directions of query + target; the query's where the two are opposite."""
    vectors = room_for(queries.shape, queries.dtype)
    for start in range(0, len(queries), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        total = queries[rows].astype(np.float64) + distinct.vectors[distinct.of_row[rows]]
        length = np.sqrt(np.add.reduce(total * total, axis=1))[:, None]
        total = np.where(length > 0, total / np.maximum(length, 1e-300), queries[rows])
        vectors[rows] = np.rint(total * GRID) / GRID + 0.0
    return vectors


def balanced_kmeans(vectors: np.ndarray, rows: np.ndarray, clusters: int, unit: int, seed: int) -> np.ndarray:
    """(n,) int64 cluster of each of `rows`, numbered from 0; sizes are multiples of `unit`, as equal as can be.

    `unit` divides n; with ``clusters == n / unit`` every cluster has exactly `unit` rows. A part is split in two by the
    difference of two centroids, its halves' means, at most `ITERATIONS` times, starting from two distant rows (k-means
    with k = 2 and fixed sizes: for given centroids the assignment that maximises the similarity is a sort).
    """
    assert len(rows) % unit == 0 and 0 < clusters <= len(rows) // unit
    labels = np.empty(len(rows), dtype=np.int64)
    parts, number = [(np.arange(len(rows)), clusters)], 0
    while parts:
        part, count = parts.pop()
        if count == 1:
            labels[part] = number
            number += 1
            continue
        first = len(part) // unit * (count // 2) // count
        near = _split(vectors, rows[part], first * unit, seed)
        parts += [(part[~near], count - count // 2), (part[near], count // 2)]
    return labels


def _split(vectors: np.ndarray, rows: np.ndarray, first: int, seed: int) -> np.ndarray:
    """(n,) bool: which of `rows` (n,) go to one side, exactly `first` of them; `vectors` (N, D) are on the grid."""
    pivot = rows[int(mix64(seed, 8, rows).argmin())]
    one = rows[int(_products(vectors, rows, vectors[pivot].astype(np.float64)).argmin())]
    two = rows[int(_products(vectors, rows, vectors[one].astype(np.float64)).argmin())]
    direction = _direction(vectors[one].astype(np.float64) - vectors[two])
    near = np.zeros(len(rows), dtype=bool)
    for _ in range(ITERATIONS):
        order = np.argsort(-_products(vectors, rows, direction), kind="stable")
        before, near = near, np.zeros(len(rows), dtype=bool)
        near[order[:first]] = True
        if np.array_equal(before, near):
            break
        total, inside = _sum(vectors, rows), _sum(vectors, rows[near])
        direction = _direction(inside / first - (total - inside) / (len(rows) - first))
    return near


def _direction(vector: np.ndarray) -> np.ndarray:
    """The unit vector on the grid; the first axis for a zero vector."""
    length = np.sqrt(np.add.reduce(vector * vector))
    if length == 0:
        return np.eye(1, len(vector))[0]
    return np.rint(vector / length * GRID) / GRID


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, fastmath={"reassoc", "contract"})(function)


@_jit
def _products(vectors, rows, direction):  # type: ignore[no-untyped-def]
    """(n,) exact float64 products of vectors and a direction, all on the grid."""
    result = np.empty(len(rows))
    for i in range(len(rows)):
        total = 0.0
        vector = vectors[rows[i]]
        for k in range(len(direction)):
            total += np.float64(vector[k]) * direction[k]
        result[i] = total
    return result


@_jit
def _sum(vectors, rows):  # type: ignore[no-untyped-def]
    """(D,) exact float64 sum of vectors on the grid."""
    total = np.zeros(vectors.shape[1])
    for row in rows:
        for k in range(vectors.shape[1]):
            total[k] += vectors[row, k]
    return total
