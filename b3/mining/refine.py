"""Swap refinement: exchange two rows of different communities while that raises the objective; sizes stay exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from b3.mining.graph import Graph
from b3.mining.hashing import seeded_order

# Four times the best edge: rows with equal targets stay apart wherever a swap allows. At 4, labels of the embedded data
# met more often than by chance (0.144 against about 0.07 a query at K = 8); at 8, 0.032, for 5 % fewer hard negatives.
DUPLICATE_COST = 8


def objective(graph: Graph, labels: np.ndarray, targets: np.ndarray) -> int:
    """Weight of the edges inside communities, less `DUPLICATE_COST` a pair of members with equal targets.

    For the union graph of distinct targets this is the number of window hits inside communities (eq. 6 of the paper
    asks to maximise the hard negatives that share a batch), less what the veto dropped.
    """
    inside = int(graph.weights[labels[graph.sources()] == labels[graph.indices]].sum()) // 2
    _, copies = np.unique(np.stack([labels, targets]), axis=1, return_counts=True)
    return inside - DUPLICATE_COST * int((copies * (copies - 1) // 2).sum())


def refine(
    graph: Graph, labels: np.ndarray, targets: np.ndarray, community_size: int, passes: int, seed: int
) -> tuple[np.ndarray, list[int]]:
    """Up to `passes` rounds of best-improvement swaps; stops early when a round finds none.

    Args:
        graph: over N rows.
        labels: (N,) int64, community of each row; all of size K.
        targets: (N,) int64, distinct target of each row.

    Returns (labels (N,) int64, gain of each pass). Communities are visited in a seeded order, on one thread.
    """
    num_parts = len(labels) // community_size
    gains: list[int] = []
    if num_parts < 2 or community_size < 2 or passes == 0:
        return labels, gains
    state = _start(graph, labels.copy(), targets, num_parts)
    for number in range(passes):
        gains.append(int(_pass(state, seeded_order(seed + number, num_parts), DUPLICATE_COST)))
        if gains[-1] == 0:
            break
    return state.labels, gains


class _State(NamedTuple):
    """Arrays that the passes share; N rows, C communities, U targets; all int64 unless said."""

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    targets: np.ndarray  # (N,)
    labels: np.ndarray  # (N,) community of each row
    members: np.ndarray  # (C, K)
    inside: np.ndarray  # (N,) weight of each row to its own community
    copies: np.ndarray  # (N,) other members of the own community with the same target
    to_home: np.ndarray  # (N,) weight of each row to the community being visited, 0 outside a visit
    to_row: np.ndarray  # (N,) weight of each row to the row being moved, 0 outside its turn
    linked: np.ndarray  # (C,) weight of each community to the row being moved, 0 outside its turn
    in_home: np.ndarray  # (U,) members of the visited community with each target, 0 outside a visit
    candidates: np.ndarray  # (C,) room for the communities that a row could move to
    crowded: bool  # whether any target occurs twice


def _start(graph: Graph, labels: np.ndarray, targets: np.ndarray, num_parts: int) -> _State:
    count = len(labels)
    members = np.argsort(labels, kind="stable").reshape(num_parts, -1)
    sources = graph.sources()
    same = labels[sources] == labels[graph.indices]
    inside = np.bincount(sources[same], weights=graph.weights[same], minlength=count).astype(np.int64)
    _, group, sizes = np.unique(labels * (targets.max() + 1) + targets, return_inverse=True, return_counts=True)
    rows, parts = np.zeros(count, np.int64), np.zeros(num_parts, np.int64)
    return _State(
        graph.indptr, graph.indices, graph.weights, targets, labels, members, inside, sizes[group.ravel()] - 1,
        rows, rows.copy(), parts, np.zeros(int(targets.max()) + 1, np.int64), parts.copy(),
        bool((np.bincount(targets) > 1).any()),
    )  # fmt: skip


def _jit(function: Any) -> Any:
    return numba.njit(cache=True)(function)


@_jit
def _copies(state, part, row):  # type: ignore[no-untyped-def]
    """Members of a community other than `row` that have its target."""
    found = 0
    for v in state.members[part]:
        if v != row and state.targets[v] == state.targets[row]:
            found += 1
    return found


@_jit
def _visit(state, home, sign):  # type: ignore[no-untyped-def]
    """Fill (sign 1) or clear (sign 0) what is known of the visited community."""
    for i in state.members[home]:
        state.in_home[state.targets[i]] = sign * (state.in_home[state.targets[i]] + 1)
        for e in range(state.indptr[i], state.indptr[i + 1]):
            v = state.indices[e]
            state.to_home[v] = sign * (state.to_home[v] + state.weights[e])


@_jit
def _find_candidates(state, order, turn, row):  # type: ignore[no-untyped-def]
    """Fill `to_row`, `linked` and `candidates` for a row; returns the number of candidates."""
    home, num = order[turn], 0
    for e in range(state.indptr[row], state.indptr[row + 1]):
        v, w = state.indices[e], state.weights[e]
        state.to_row[v] = w
        part = state.labels[v]
        if part != home:
            if state.linked[part] == 0:
                state.candidates[num] = part
                num += 1
            state.linked[part] += w
    if state.copies[row] == 0:
        return num
    for k in range(1, 9):  # away from a copy, a community without an edge may do: try some
        part = order[(turn + (k if order.size < 10 else k * k * 7919)) % order.size]  # where few: each of them
        fresh = part != home and state.linked[part] == 0
        for q in range(num):
            fresh = fresh and state.candidates[q] != part
        if fresh:
            state.candidates[num] = part
            num += 1
    return num


@_jit
def _best_swap(state, row, num, cost):  # type: ignore[no-untyped-def]
    """The swap of `row` with a member of a candidate community that gains most: (gain, partner); gain 0: none."""
    best, partner = 0, -1
    for k in range(num):
        away = state.candidates[k]
        side = state.linked[away] - state.inside[row]
        there = _copies(state, away, row) if state.crowded else 0
        # A swap that gains does so for one of its two rows; where only for the other, that row's own turn finds it.
        if side + cost * (state.copies[row] - there) <= 0 and (side <= 0 or there == 0):
            continue
        for v in state.members[away]:
            gain = side + state.to_home[v] - state.inside[v] - 2 * state.to_row[v]
            if state.crowded:
                same = 1 if state.targets[v] == state.targets[row] else 0
                lost = state.copies[row] + state.copies[v]
                gain -= cost * (there - same + state.in_home[state.targets[v]] - same - lost)
            if gain > best:
                best, partner = gain, v
    return best, partner


@_jit
def _leave(state, row, other, home, away):  # type: ignore[no-untyped-def]
    """Account for `row` going from `home` to `away` in the connections of its neighbours, `other` excepted."""
    for e in range(state.indptr[row], state.indptr[row + 1]):
        v, w = state.indices[e], state.weights[e]
        if v != other:
            if state.labels[v] == home:
                state.inside[v] -= w
            elif state.labels[v] == away:
                state.inside[v] += w


@_jit
def _swap(state, i, j, home, slot):  # type: ignore[no-untyped-def]
    """Exchange row i of the visited community (at `slot`) with row j of another."""
    away, between = state.labels[j], state.to_row[j]
    inside_i, inside_j = state.linked[away] - between, state.to_home[j] - between
    _leave(state, i, j, home, away)
    _leave(state, j, i, away, home)
    state.inside[i], state.inside[j] = inside_i, inside_j
    for e in range(state.indptr[i], state.indptr[i + 1]):
        state.to_home[state.indices[e]] -= state.weights[e]
    for e in range(state.indptr[j], state.indptr[j + 1]):
        state.to_home[state.indices[e]] += state.weights[e]
    state.in_home[state.targets[i]] -= 1
    state.in_home[state.targets[j]] += 1
    state.labels[i], state.labels[j] = away, home
    state.members[home, slot] = j
    for q in range(state.members.shape[1]):
        if state.members[away, q] == j:
            state.members[away, q] = i
    if state.crowded:
        for v in state.members[home]:
            state.copies[v] = _copies(state, home, v)
        for v in state.members[away]:
            state.copies[v] = _copies(state, away, v)


@_jit
def _pass(state, order, cost):  # type: ignore[no-untyped-def]
    """One visit to every community in the given order; returns the gain of the objective."""
    total = 0
    for turn in range(order.size):
        home = order[turn]
        _visit(state, home, 1)
        for slot in range(state.members.shape[1]):
            i = state.members[home, slot]
            num = _find_candidates(state, order, turn, i)
            gain, j = _best_swap(state, i, num, cost)
            if gain > 0:
                total += gain
                _swap(state, i, j, home, slot)
            for e in range(state.indptr[i], state.indptr[i + 1]):
                state.to_row[state.indices[e]] = 0
            for k in range(num):
                state.linked[state.candidates[k]] = 0
        _visit(state, home, 0)
    return total
