"""The method written as plainly as possible, for small N: what the fast code is compared with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from b3.mining.vectors import unit_rows


def clustered(
    rows: int, dim: int = 24, clusters: int | None = None, noise: float = 0.6, seed: int = 0, labels: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(queries, targets), each (N, D) float32: noisy views of points in clusters; `labels`: that many targets."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters or max(2, rows // 25), dim))
    points = centres[rng.integers(0, len(centres), labels or rows)] + 0.7 * rng.normal(size=(labels or rows, dim))
    if labels:
        targets = points[rng.integers(0, labels, rows)]
        return (targets + noise * rng.normal(size=(rows, dim))).astype(np.float32), targets.astype(np.float32)
    return tuple((points + noise * rng.normal(size=(rows, dim))).astype(np.float32) for _ in range(2))  # type: ignore


def distinct_of(targets: np.ndarray) -> np.ndarray:
    """(N,) distinct target of each row, numbered by first occurrence."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in unit_rows(targets, "targets")])


def ranking(queries: np.ndarray, targets: np.ndarray) -> list[list[int]]:
    """For each query all distinct targets, best first, ties by number; scores in exact rational arithmetic."""
    units = unit_rows(queries, "queries").tolist()
    number = distinct_of(targets)
    first = [int(np.flatnonzero(number == u)[0]) for u in range(number.max() + 1)]
    vectors = [[Fraction(x) for x in row] for row in unit_rows(targets, "targets")[first].tolist()]
    orders = []
    for query in units:
        exact = [Fraction(x) for x in query]
        scores = [sum(a * b for a, b in zip(exact, v, strict=True)) for v in vectors]
        orders.append(sorted(range(len(vectors)), key=lambda u: (-scores[u], u)))
    return orders


def window_hits(orders: list[list[int]], number: np.ndarray, p: int, m: int) -> np.ndarray:
    """(N, N) bool: j's target is in ranks [p, p + m) of query i and not i's own."""
    inside = np.zeros((len(orders), len(orders)), dtype=bool)
    for i, order in enumerate(orders):
        inside[i] = np.isin(number, order[p : p + m]) & (number != number[i])
    return inside


def skipped(orders: list[list[int]], number: np.ndarray, p: int) -> np.ndarray:
    """(N, N) bool: j's target is above rank p of query i and not i's own."""
    return window_hits(orders, number, 0, p)


def weights(orders: list[list[int]], number: np.ndarray, p: int, m: int, edges: str, veto: bool) -> np.ndarray:
    """(N, N) int edge weights."""
    hits, above = window_hits(orders, number, p, m), skipped(orders, number, p)
    if edges == "mutual":
        return (hits & hits.T).astype(int)
    both = hits.astype(int) + hits.T
    return np.where(above | above.T, 0, both) if veto else both


def dense(graph: object) -> np.ndarray:
    """(N, N) weights of a `Graph`."""
    matrix = np.zeros((len(graph), len(graph)), dtype=int)  # type: ignore[arg-type]
    matrix[graph.sources(), graph.indices] = graph.weights  # type: ignore[attr-defined]
    return matrix
