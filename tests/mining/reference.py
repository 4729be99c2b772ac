"""The method written as plainly as possible, for small N: what the fast code is compared with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from b3.mining.vectors import mix64, seeded_order, unit_rows


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
    sources = np.repeat(np.arange(len(graph)), np.diff(graph.indptr))  # type: ignore[arg-type, attr-defined]
    matrix[sources, graph.indices] = graph.weights  # type: ignore[attr-defined]
    return matrix


def swaps(
    matrix: np.ndarray, groups: np.ndarray, targets: np.ndarray, temperatures: list[float], seed: int, cost: int
) -> tuple[np.ndarray, list[int]]:
    """(groups, gains) of annealed swaps over a dense matrix of weights (N, N), each swap valued from scratch."""
    size = int((groups == 0).sum())
    members = [np.flatnonzero(groups == part).tolist() for part in range(len(groups) // size)]
    groups, gains = groups.copy(), []

    def value(rows: list[int]) -> int:
        _, copies = np.unique(targets[rows], return_counts=True)
        return int(matrix[np.ix_(rows, rows)].sum()) // 2 - cost * int((copies * (copies - 1) // 2).sum())

    def swapped(rows: list[int], out: int, into: int) -> list[int]:
        return [into if row == out else row for row in rows]

    for number, temperature in enumerate(temperatures):
        order, drawn, total = seeded_order(seed + number, len(members)), int(mix64(seed, 7, number)[0]), 0
        for turn, home in enumerate(order):
            for slot in range(size):
                i, floor = members[home][slot], 0.0
                if temperature > 0:  # SplitMix64, one number for each row
                    drawn = (drawn + 0x9E3779B97F4A7C15) % 2**64
                    x = (drawn ^ (drawn >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
                    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
                    floor = temperature * float(np.log((((x ^ (x >> 31)) >> 12) + 0.5) / 2**52))
                places = [int(groups[v]) for v in np.flatnonzero(matrix[i])]
                if (targets[members[home]] == targets[i]).sum() > 1:
                    steps = [k if len(order) < 10 else k * k * 7919 for k in range(1, 9)]
                    places += [int(order[(turn + step) % len(order)]) for step in steps]
                best, partner = floor, -1
                for away in dict.fromkeys(places):
                    before = value(members[home]) + value(members[away])
                    for v in members[away] if away != home else []:
                        gain = value(swapped(members[home], i, v)) + value(swapped(members[away], v, i)) - before
                        if gain > best:
                            best, partner = gain, v
                if partner >= 0:
                    away = int(groups[partner])
                    members[home], members[away] = (
                        swapped(members[home], i, partner),
                        swapped(members[away], partner, i),
                    )
                    groups[i], groups[partner], total = away, home, total + int(best)
        gains.append(total)
        if temperature == 0 and total == 0:
            break
    return groups, gains
