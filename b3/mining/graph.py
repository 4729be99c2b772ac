"""What is cut into communities: rows, their rankings, and the graph whose edges join hard negatives of each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np

from b3.config.schema import MiningOptions
from b3.console import Clock
from b3.memory import room_for
from b3.mining.rankings import Rankings
from b3.mining.vectors import DistinctTargets, mix64, uniform

EDGE_BLOCK = 1 << 20  # entries of some twelve arrays
SPARE_EDGES = 1_500_000  # where targets repeat, a small data set keeps over m edges per row, up to this many in all


@dataclass(frozen=True)
class Graph:
    """A symmetric graph without loops in compressed rows; the neighbours of i are ``indices[indptr[i]:indptr[i+1]]``.

    Attributes: indptr (N + 1,) int64, indices (E,) int32 ascending in a row, weights (E,) int8: 1 or 2.
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

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {"edges": self.num_edges, "isolated_rows": int((np.diff(self.indptr) == 0).sum())}

    def degrees(self) -> np.ndarray:
        """(N,) int64: sum of the weights at each row."""
        from b3.mining.graph_kernels import degrees

        total: np.ndarray = degrees(self.indptr, self.weights)
        return total

    def inside(self, groups: np.ndarray) -> np.ndarray:
        """(N,) int32: the weight of each row's edges to rows of its own group, of `groups` (N,)."""
        from b3.mining.graph_kernels import inside

        total: np.ndarray = inside(self.indptr, self.indices, self.weights, groups)
        return total

    def restrict(self, rows: np.ndarray, in_place: bool = False) -> Graph:
        """The graph over `rows` (ascending), renumbered 0, 1, ...; `in_place`: in the memory of this one, then lost."""
        from b3.mining.graph_kernels import restrict

        if len(rows) == len(self):
            return self
        indices, weights = (a if in_place else np.empty_like(a) for a in (self.indices, self.weights))
        indptr = restrict(self.indptr, self.indices, self.weights, rows, places(rows, len(self)), indices, weights)
        return Graph(indptr, indices[: indptr[-1]], weights[: indptr[-1]])


def places(members: np.ndarray, num_rows: int) -> np.ndarray:
    """(N,) int32: the number of each row within `members`, -1 for the others."""
    place = np.full(num_rows, -1, dtype=np.int32)
    place[members] = np.arange(len(members))
    return place


def window_rows(
    rankings: Rankings, distinct: DistinctTargets, budget: int, seed: int, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The directed edges of every query i to the rows that carry targets of its window, its own target left out.

    Up to `budget` such rows are all taken. Where there are more (targets shared by many rows), the rows are sampled so
    that about `budget` remain, whatever N is: the rows of each target are spread over a circle in a seeded order, each
    at its slot, and query i takes those within reach of its own slot, the reach being budget / number of rows. Rows
    near each other on the circle thus keep the full window structure among themselves, each target about once, as if a
    large data set were many small ones; independent sampling would thin all of it.

    Args:
        place: (N,) the number of each row (`places`); rows with -1 are left out on both sides.

    Returns (indptr (n + 1,) int64, rows (E,) int32), both in these numbers.
    """
    by_slot, slots, phase = _slots(distinct, seed)
    degrees, num = [np.zeros(1, dtype=np.int64)], 0
    # edges of a row at most: `_reached` rounds up once for each target
    most = min(rankings.m * int(distinct.counts.max()), budget + rankings.m)
    neighbours = room_for(int((place >= 0).sum()) * most, np.int32)
    step = max(1, EDGE_BLOCK // max(rankings.m, budget))
    for start in range(0, len(rankings), step):
        rows = start + np.flatnonzero(place[start : start + step] >= 0)
        if not len(rows):
            continue
        num_near, at = _reached(rankings.window(rows), slots[rows], phase, rankings.target_ids[rows], distinct, budget)
        ends = place[by_slot[at]]
        is_member = ends >= 0
        degrees.append(np.bincount(np.repeat(np.arange(len(rows)), num_near)[is_member], minlength=len(rows)))
        count = int(is_member.sum())
        neighbours[num : num + count] = ends[is_member]
        num += count
    return np.cumsum(np.concatenate(degrees)), neighbours[:num]


def _reached(
    window: np.ndarray,
    slots: np.ndarray,
    phase: np.ndarray,
    target_ids: np.ndarray,
    distinct: DistinctTargets,
    budget: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(number of rows for each query (n,), positions (E,) of these rows in the order of the slots).

    Args:
        window: (n, k) distinct targets in the window of each query.
        slots: (n,) of the queries; phase: (U,) of the targets; both in [0, 1), see `_slots`.
        target_ids: (n,) the queries' own targets, of which no row is taken.
    """
    # Row r of a target with `size` rows has the slot (r + phase) / size; `low` and `high` are the r at both ends of
    # what is within reach, and may lie beyond 0 and size: the circle closes by the remainder below.
    size = np.where(window == target_ids[:, None], 0, distinct.counts[window])
    total = size.sum(axis=1)
    reach = np.minimum(1.0, budget / np.maximum(total, 1))[:, None] / 2
    low = np.ceil((slots[:, None] - reach) * size - phase[window]).astype(np.int64)
    high = np.ceil((slots[:, None] + reach) * size - phase[window]).astype(np.int64)
    num_near = np.where((total <= budget)[:, None], size, np.minimum(high - low, size))
    # One entry per row taken: the r of its target (counting from `low`), then its position among all rows.
    each = num_near.ravel()
    start = np.repeat(np.cumsum(each) - each, each)
    place = np.repeat(low.ravel(), each) + np.arange(each.sum()) - start
    first = np.repeat(distinct.starts[window.ravel()], each)
    return num_near.sum(axis=1), first + place % np.repeat(size.ravel(), each)


def _slots(distinct: DistinctTargets, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (N,) int32 in the order of the slots, slot (N,) of each row in [0, 1), phase (U,) of each target.

    The rows of a target, in the order of a seeded hash, are evenly spaced on the circle from its phase on.
    """
    num_rows = len(distinct.of_row)
    by_slot = np.lexsort((mix64(seed, 1, np.arange(num_rows)), distinct.of_row))
    phase = uniform(mix64(seed, 2, np.arange(len(distinct))))
    target = distinct.of_row[by_slot]
    slots = np.empty(num_rows)
    slots[by_slot] = (np.arange(num_rows) - distinct.starts[target] + phase[target]) / distinct.counts[target]
    return by_slot.astype(np.int32), slots, phase


def build_graph(
    rankings: Rankings,
    distinct: DistinctTargets,
    edges: str,
    veto: bool,
    budget: int,
    seed: int,
    members: np.ndarray | None = None,
) -> Graph:
    """Join rows i and j where one's target is in the window of the other.

    union: weight = number of directions that hold, 1 or 2, so that the weight inside a community is the number of
    window hits that it contains; with `veto` a pair is dropped if either ranks the other's target above the window.
    mutual: both directions must hold (paper, section 3.2); weight 1; vetoes by itself.
    members: (n,) rows, ascending: the graph over these alone, renumbered; default: all.
    """
    assert edges in ("union", "mutual")
    from b3.mining.graph_kernels import count_both, fill_both, weigh

    members = np.arange(len(rankings)) if members is None else members
    indptr, rows = window_rows(rankings, distinct, budget, seed, places(members, len(rankings)))
    weights = room_for(len(rows), np.int8)  # of an edge from i to j: by where row j has i's target
    weigh(rankings.order, rankings.p, distinct.of_row, members, indptr, rows, edges == "union", veto, weights)
    ends = count_both(indptr, rows, weights)
    graph = Graph(ends, room_for(int(ends[-1]), np.int32), room_for(int(ends[-1]), np.int8))
    fill_both(indptr, rows, weights, graph.indptr, graph.indices, graph.weights)
    return graph


@dataclass
class Problem:
    """What a miner cuts into communities.

    Attributes:
        queries: (N, D) float32 unit vectors on the grid.
        rankings, distinct: of all N rows.
        rows: (n,) int64, ascending, the rows to be cut.
        facts: what is to be said of the cut in the report.
    """

    queries: np.ndarray
    rankings: Rankings
    distinct: DistinctTargets
    rows: np.ndarray
    options: MiningOptions
    clock: Clock
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> np.ndarray:
        """(n,) distinct target of each row."""
        return self.distinct.of_row[self.rows]

    @cached_property
    def graph(self) -> Graph:
        """The graph over `rows`, built when it is first asked for; `del problem.graph` frees it."""
        options, num_rows = self.options, len(self.rankings)
        with self.clock.stage("graph"):
            budget = max(options.m, SPARE_EDGES // num_rows)
            edges = options.edges or "union"
            graph = build_graph(self.rankings, self.distinct, edges, options.veto, budget, options.seed, self.rows)
        self.facts |= graph.facts()
        return graph

    def part(self, positions: np.ndarray) -> Problem:
        """The problem of some of the rows, by position."""
        return replace(self, rows=self.rows[positions], facts={})

    def place(self, positions: np.ndarray, communities: np.ndarray) -> np.ndarray:
        """(n,) int64 community of each row, -1 for a row in none, from the `communities` (k,) at `positions` (k,)."""
        community_of = np.full(len(self), -1, dtype=np.int64)
        community_of[positions] = communities
        return community_of


def kept_rows(graph: Graph | None, num_rows: int, community_size: int, seed: int) -> np.ndarray:
    """(n - n mod K,) int64, ascending: the rows that go into communities.

    Left out are the least connected ones, ties by a seeded hash; without a graph random ones.
    """
    degrees = np.zeros(num_rows, dtype=np.int64) if graph is None else graph.degrees()
    order = np.lexsort((mix64(seed, 3, np.arange(num_rows)), degrees))
    return np.sort(order[num_rows % community_size :]).astype(np.int64)


def merge_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the report says of several parts together: sums, smallest and largest sizes; gains pass by pass."""
    merged: dict[str, Any] = {}
    for facts in parts:
        for key, value in facts.items():
            if key not in merged:
                merged[key] = value
            elif isinstance(value, list):
                merged[key] = [a + b for a, b in zip_longest(merged[key], value, fillvalue=0)]
            elif key.endswith(("_min", "_max")):
                merged[key] = (min if key.endswith("_min") else max)(merged[key], value)
            else:
                merged[key] += value
    return merged
