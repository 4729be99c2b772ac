"""Annealed swaps: exchange rows of different communities until the objective stops growing; sizes stay exact.

A pass visits every community; each of its rows looks for the best swap with a row of another community that it has an
edge to. At temperature T the swap is taken if its gain exceeds T ln(u), u uniform in (0, 1): the Metropolis rule of
simulated annealing (Kirkpatrick et al. 1983) on the best neighbour. T falls geometrically from pass to pass and is 0 in
the last ones. One thread and seeded choices make the result a function of the arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from b3.config.schema import MiningOptions
from b3.console import Clock
from b3.mining.graph import Graph, Problem, kept_rows
from b3.mining.miners.random import random_groups
from b3.mining.vectors import mix64, seeded_order

# Four times the best edge: rows with equal targets stay apart wherever a swap allows. At 4, labels of the embedded data
# met more often than by chance (0.144 against about 0.07 times per query at K = 8); at 8, 0.032, for 5 % fewer mined
# negatives.
DUPLICATE_COST = 8
# Of the first and the last warm pass, in units of the objective. From 6, the result on a graph of 100,000 WordNet rows
# no longer depends on the start (METIS or random) at K = 8 to 512; see docs/log.md.
HOTTEST, COOLEST = 6.0, 0.4
COLD_PASSES = 3
NOTHING = np.int32(-(1 << 30))


def cut(problem: Problem, options: MiningOptions, clock: Clock) -> np.ndarray:
    """(n,) int64 community of each row, -1 for the n mod K rows in none; every community has exactly K rows."""
    size, seed = options.community_size, options.seed
    positions = kept_rows(problem.graph, len(problem), size, seed)
    graph, targets = problem.graph.restrict(positions), problem.targets[positions]
    with clock.stage("partition"):
        groups = random_groups(len(positions), size, seed)
    if options.refine_passes:
        with clock.stage("refine"):
            before = objective(graph, groups, targets)
            groups, gains = refine(graph, groups, targets, size, options.refine_passes, seed, clock.progress)
            problem.facts |= {"objective_before_refinement": before, "refinement_gains": gains}
    return problem.place(positions, groups)


def objective(graph: Graph, groups: np.ndarray, targets: np.ndarray) -> int:
    """Weight of the edges inside communities, minus `DUPLICATE_COST` per pair of members with equal targets.

    For the union graph of distinct targets this is the number of window hits inside communities (eq. 6 of the paper
    asks to maximise the hard negatives that share a batch), minus what the veto dropped.
    """
    inside = int(graph.weights[groups[graph.sources()] == groups[graph.indices]].sum(dtype=np.int64)) // 2
    _, copies = np.unique(groups * (int(targets.max()) + 1) + targets, return_counts=True)
    return inside - DUPLICATE_COST * int((copies * (copies - 1) // 2).sum())


def temperatures(passes: int) -> list[float]:
    """Temperatures by pass: geometric from `HOTTEST` to `COOLEST`, then `COLD_PASSES` at 0; few passes are all cold."""
    warm = passes - COLD_PASSES
    if warm < 2:
        return [0.0] * passes
    return [HOTTEST * (COOLEST / HOTTEST) ** (k / (warm - 1)) for k in range(warm)] + [0.0] * COLD_PASSES


def refine(
    graph: Graph,
    groups: np.ndarray,
    targets: np.ndarray,
    community_size: int,
    passes: int,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[np.ndarray, list[int]]:
    """`passes` rounds of annealed swaps; stops early when a cold round finds none. Never lowers the objective.

    Args:
        graph: over N rows.
        groups: (N,) int64, community of each row; all of size K.
        targets: (N,) int64, distinct target of each row.
        progress: called as ``progress("refine", passes done, passes)``.

    Returns (groups (N,) int64, gain of each pass); (the given groups, []) if nothing better was found.
    """
    num_parts = len(groups) // community_size
    gains: list[int] = []
    if num_parts < 2 or community_size < 2 or passes == 0:
        return groups, gains
    state = _start(graph, groups, targets, num_parts)
    for number, temperature in enumerate(temperatures(passes)):
        stream = mix64(seed, 7, number)[:1].copy()
        gains.append(int(_pass(state, seeded_order(seed + number, num_parts), temperature, DUPLICATE_COST, stream)))
        if progress:
            progress("refine", number + 1, passes)
        if temperature == 0 and gains[-1] == 0:
            break
    if sum(gains) <= 0:
        return groups, []
    return state.groups.astype(np.int64), gains


class _State(NamedTuple):
    """Arrays that the passes share; N rows, C communities, U targets; int32 unless said.

    What is used as an index is unsigned, which spares the compiled loops a look at its sign.
    """

    indptr: np.ndarray  # int64
    indices: np.ndarray  # uint32
    weights: np.ndarray  # int8
    targets: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) uint32, community of each row
    members: np.ndarray  # (C, K) uint32
    copies: np.ndarray  # (N,) other members of the own community with the same target
    stay: np.ndarray  # (N,) what the row contributes where it is: weight to its community minus the cost of copies
    least: np.ndarray  # (C,) smallest `stay` of the members, or less
    to_home: np.ndarray  # (N,) weight of each row to the visited community, 0 outside a visit
    pull: np.ndarray  # (C,) largest `to_home - stay` of the members with an edge to the visited community, or more
    reached: np.ndarray  # uint32, room for the rows with an edge to the visited community, each at least once
    linked: np.ndarray  # (C,) weight of each community to the row being moved, 0 between two rows
    in_home: np.ndarray  # (U,) members of the visited community with each target, 0 outside a visit
    touched: np.ndarray  # (C,) uint32, room for the communities with a `pull`
    candidates: np.ndarray  # (C + 1,) uint32, room for the communities that a row could move to
    crowded: bool  # whether any target occurs twice


def _start(graph: Graph, groups: np.ndarray, targets: np.ndarray, num_parts: int) -> _State:
    """The state before the first pass, of `groups` (N,) and distinct `targets` (N,)."""
    count = len(groups)
    members = np.argsort(groups, kind="stable").reshape(num_parts, -1).astype(np.uint32)
    sources = graph.sources()
    is_inside = groups[sources] == groups[graph.indices]
    inside = np.bincount(sources[is_inside], weights=graph.weights[is_inside], minlength=count).astype(np.int32)
    # (community, target) as one number: rows that share it are copies of each other
    _, group, sizes = np.unique(groups * (int(targets.max()) + 1) + targets, return_inverse=True, return_counts=True)
    copies = (sizes[group.ravel()] - 1).astype(np.int32)
    stay = inside - DUPLICATE_COST * copies
    parts = np.zeros(num_parts, np.int32)
    return _State(
        graph.indptr, graph.indices.astype(np.uint32), graph.weights, targets.astype(np.int32),
        groups.astype(np.uint32), members, copies,
        stay, stay[members].min(axis=1), np.zeros(count, np.int32), np.full(num_parts, NOTHING),
        np.zeros(count + int(np.diff(graph.indptr).max()) * members.shape[1] + 1, np.uint32), parts.copy(),
        np.zeros(int(targets.max()) + 1, np.int32), parts.astype(np.uint32), np.zeros(num_parts + 1, np.uint32),
        bool((np.bincount(targets) > 1).any()),
    )  # fmt: skip


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True)(function)


@_jit
def _uniform(stream):  # type: ignore[no-untyped-def]
    """The next number in (0, 1) of a SplitMix64 stream, whose state is ``stream[0]`` (Steele et al. 2014)."""
    stream[0] += np.uint64(0x9E3779B97F4A7C15)
    x = stream[0]
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(12)) + 0.5) * 2.0**-52


@_jit
def _weight(indptr, indices, weights, row, other):  # type: ignore[no-untyped-def]
    """Weight of the edge between two rows, 0 if there is none."""
    low, end = indptr[row], indptr[row + 1]
    high = end
    while low < high:
        middle = (low + high) >> 1
        if indices[middle] < other:
            low = middle + 1
        else:
            high = middle
    return np.int32(weights[low]) if low < end and indices[low] == other else np.int32(0)


@_jit
def _copies(targets, members, row):  # type: ignore[no-untyped-def]
    """Members of a community other than `row` that have its target."""
    num = 0
    for v in members:
        if v != row and targets[v] == targets[row]:
            num += 1
    return num


@_jit
def _offers(groups, to_home, stay, pull, touched, rows, num):  # type: ignore[no-untyped-def]
    """Raise `pull` of the communities of `rows` to what these offer; returns the number of communities touched."""
    for v in rows:
        part, offer = groups[v], to_home[v] - stay[v]
        if offer > pull[part]:
            if pull[part] == NOTHING:
                touched[num] = part
                num += 1
            pull[part] = offer
    return num


@_jit
def _reach(to_home, reached, num, neighbours, weights):  # type: ignore[no-untyped-def]
    """Add a row of the visited community to `to_home` of its neighbours; returns the number of rows reached.

    Without a branch, whose outcome could not be foreseen: what is written last stays only if the number grows.
    """
    for e in range(len(neighbours)):
        v = neighbours[e]
        reached[num] = v
        num += to_home[v] == 0
        to_home[v] += weights[e]
    return num


@_jit
def _enter(state, home):  # type: ignore[no-untyped-def]
    """Fill `in_home`, `to_home`, `pull` for the visited community; returns the numbers of rows and communities."""
    far = 0
    for i in state.members[home]:
        state.in_home[state.targets[i]] += 1
        edges = slice(state.indptr[i], state.indptr[i + 1])
        far = _reach(state.to_home, state.reached, far, state.indices[edges], state.weights[edges])
    rows = state.reached[:far]
    return far, _offers(state.groups, state.to_home, state.stay, state.pull, state.touched, rows, 0)


@_jit
def _leave_home(state, home, far, num):  # type: ignore[no-untyped-def]
    """Clear what `_enter` filled."""
    for k in range(num):
        state.pull[state.touched[k]] = NOTHING
    for k in range(far):
        state.to_home[state.reached[k]] = 0
    least = state.stay[state.members[home, 0]]
    for i in state.members[home]:
        least = min(least, state.stay[i])
        state.in_home[state.targets[i]] = 0
    state.least[home] = least


@_jit
def _link(groups, linked, candidates, neighbours, weights):  # type: ignore[no-untyped-def]
    """Add the edges of a row to `linked` of its neighbours' communities; returns how many these are."""
    num = 0
    for e in range(len(neighbours)):
        part = groups[neighbours[e]]
        candidates[num] = part
        num += linked[part] == 0
        linked[part] += weights[e]
    return num


@_jit
def _find_candidates(state, order, turn, row):  # type: ignore[no-untyped-def]
    """Fill `linked` and `candidates` for a row; returns the number of candidates, the own community included."""
    edges = slice(state.indptr[row], state.indptr[row + 1])
    num = _link(state.groups, state.linked, state.candidates, state.indices[edges], state.weights[edges])
    if state.copies[row] == 0:
        return num
    first = num
    for k in range(1, 9):  # away from a copy, a community without an edge may do: try some
        part = order[(turn + (k if order.size < 10 else k * k * 7919)) % order.size]  # where few: each of them
        is_new = state.linked[part] == 0
        for place in range(first, num):
            is_new = is_new and state.candidates[place] != part
        if is_new:
            state.candidates[num] = part
            num += 1
    return num


@_jit
def _best_swap(state, row, home, num, cost, floor):  # type: ignore[no-untyped-def]
    """The swap of `row` with a member of a candidate community that gains most, above `floor`: (gain, partner)."""
    best, partner = floor, -1
    for k in range(num):
        away = state.candidates[k]
        side = state.linked[away] - state.stay[row]
        # No member offers more than `pull` (those with an edge to the visited community) or `-least` (the others).
        if away == home or side + max(state.pull[away], -state.least[away]) <= best:
            continue
        there = _copies(state.targets, state.members[away], row) if state.crowded else 0
        for v in state.members[away]:
            # both rows gain what they find minus what they leave; the edge between them is lost twice
            gain = side + state.to_home[v] - state.stay[v]
            if gain <= best:
                continue
            if state.crowded:
                same = 1 if state.targets[v] == state.targets[row] else 0
                gain -= cost * (there - same + state.in_home[state.targets[v]] - same)
            if state.to_home[v] != 0:
                gain -= 2 * _weight(state.indptr, state.indices, state.weights, row, v)
            if gain > best:
                best, partner = gain, v
    return best, partner


@_jit
def _move(state, row, other, home, away):  # type: ignore[no-untyped-def]
    """Account for `row` going from `home` to `away` in what its neighbours contribute, `other` excepted."""
    for e in range(state.indptr[row], state.indptr[row + 1]):
        v, w = state.indices[e], state.weights[e]
        if v != other:
            if state.groups[v] == home:
                state.stay[v] -= w
            elif state.groups[v] == away:
                state.stay[v] += w


@_jit
def _recount(state, part, cost):  # type: ignore[no-untyped-def]
    """Count the copies in a community again."""
    for v in state.members[part]:
        copies = _copies(state.targets, state.members[part], v)
        state.stay[v] -= cost * (copies - state.copies[v])
        state.copies[v] = copies


@_jit
def _swap(state, i, j, home, slot, cost, far, num):  # type: ignore[no-untyped-def]
    """Exchange row i of the visited community (at `slot`) with row j of another; returns rows and communities."""
    away, between = state.groups[j], _weight(state.indptr, state.indices, state.weights, i, j)
    inside_i, inside_j = state.linked[away] - between, state.to_home[j] - between
    _move(state, i, j, home, away)
    _move(state, j, i, away, home)
    state.stay[i], state.stay[j] = inside_i, inside_j
    state.copies[i], state.copies[j] = 0, 0
    for e in range(state.indptr[i], state.indptr[i + 1]):
        state.to_home[state.indices[e]] -= state.weights[e]
    edges = slice(state.indptr[j], state.indptr[j + 1])
    far = _reach(state.to_home, state.reached, far, state.indices[edges], state.weights[edges])
    state.in_home[state.targets[i]] -= 1
    state.in_home[state.targets[j]] += 1
    state.groups[i], state.groups[j] = away, home
    state.members[home, slot] = j
    for q in range(state.members.shape[1]):
        if state.members[away, q] == j:
            state.members[away, q] = i
    if state.crowded:
        _recount(state, home, cost)
        _recount(state, away, cost)
    num = _offers(state.groups, state.to_home, state.stay, state.pull, state.touched, state.indices[edges], num)
    num = _offers(state.groups, state.to_home, state.stay, state.pull, state.touched, state.members[away], num)
    least = state.stay[i]
    for v in state.members[away]:
        least = min(least, state.stay[v])
    state.least[away] = least
    return far, num


@_jit
def _pass(state, order, temperature, cost, stream):  # type: ignore[no-untyped-def]
    """One visit to every community in the given order; returns the gain of the objective."""
    total = 0
    for turn in range(order.size):
        home = order[turn]
        far, touched = _enter(state, home)
        for slot in range(state.members.shape[1]):
            i = state.members[home, slot]
            num = _find_candidates(state, order, turn, i)
            floor = temperature * np.log(_uniform(stream)) if temperature > 0 else 0.0
            gain, j = _best_swap(state, i, home, num, cost, floor)
            if j >= 0:
                total += int(gain)
                far, touched = _swap(state, i, j, home, slot, cost, far, touched)
            for k in range(num):
                state.linked[state.candidates[k]] = 0
        _leave_home(state, home, far, touched)
    return total
