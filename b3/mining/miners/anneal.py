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
from b3.mining.prefetch import prefetch
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
BLOCK_EDGES = 1 << 22
MOST_NARROW = 1 << 16  # values that two bytes hold


def cut(problem: Problem, options: MiningOptions, clock: Clock) -> np.ndarray:
    """(n,) int64 community of each row, -1 for the n mod K rows in none; every community has exactly K rows."""
    size, seed = options.community_size, options.seed
    positions = kept_rows(problem.graph, len(problem), size, seed)
    graph, targets = problem.graph.restrict(positions, in_place=True), problem.targets[positions]
    del problem.graph  # its memory is the restricted one's, and then that of the swaps
    with clock.stage("partition"):
        groups = random_groups(len(positions), size, seed)
    if options.refine_passes:
        with clock.stage("refine"):
            before = objective(graph, groups, targets)
            passes = options.refine_passes
            groups, gains = refine(graph, groups, targets, size, passes, seed, clock.progress, in_place=True)
            problem.facts |= {"objective_before_refinement": before, "refinement_gains": gains}
    return problem.place(positions, groups)


def objective(graph: Graph, groups: np.ndarray, targets: np.ndarray) -> int:
    """Weight of the edges inside communities, minus `DUPLICATE_COST` per pair of members with equal targets.

    For the union graph of distinct targets this is the number of window hits inside communities (eq. 6 of the paper
    asks to maximise the hard negatives that share a batch), minus what the veto dropped.
    """
    inside = int(graph.inside(groups).sum(dtype=np.int64)) // 2
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
    in_place: bool = False,
) -> tuple[np.ndarray, list[int]]:
    """`passes` rounds of annealed swaps; stops early when a cold round finds none. Never lowers the objective.

    Args:
        graph: over N rows.
        groups: (N,) int64, community of each row; all of size K.
        targets: (N,) int64, distinct target of each row.
        progress: called as ``progress("refine", passes done, passes)``.
        in_place: the edges take the memory of the graph, which is lost.

    Returns (groups (N,) int64, gain of each pass); (the given groups, []) if nothing better was found.
    """
    num_parts = len(groups) // community_size
    gains: list[int] = []
    if num_parts < 2 or community_size < 2 or passes == 0:
        return groups, gains
    state = _start(graph, groups, targets, num_parts, in_place)
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
    edges: np.ndarray  # uint32, `_pack` of each neighbour and weight
    targets: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) uint16 or uint32, community of each row
    members: np.ndarray  # (C, K) uint32
    copies: np.ndarray  # (N,) other members of the own community with the same target
    stay: np.ndarray  # (N,) int16 or int32, what the row contributes where it is: weight inside minus cost of copies
    least: np.ndarray  # (C,) smallest `stay` of the members, or less
    to_home: np.ndarray  # (N,) int16 or int32, weight of each row to the visited community, 0 outside a visit
    pull: np.ndarray  # (C,) largest `to_home - stay` of the members with an edge to the visited community, or more
    reached: np.ndarray  # uint32, room for the rows with an edge to the visited community, each at least once
    linked: np.ndarray  # (C,) weight of each community to the row being moved, 0 between two rows
    in_home: np.ndarray  # (U,) members of the visited community with each target, 0 outside a visit
    touched: np.ndarray  # uint32, room for the communities with a `pull`
    candidates: np.ndarray  # uint32, room for the communities that a row could move to
    crowded: bool  # whether any target occurs twice


def _start(graph: Graph, groups: np.ndarray, targets: np.ndarray, num_parts: int, in_place: bool = False) -> _State:
    """The state before the first pass, of `groups` (N,) and distinct `targets` (N,)."""
    count = len(groups)
    members = np.argsort(groups, kind="stable").reshape(num_parts, -1).astype(np.uint32)
    # (community, target) as one number: rows that share it are copies of each other
    _, group, sizes = np.unique(groups * (int(targets.max()) + 1) + targets, return_inverse=True, return_counts=True)
    copies = (sizes[group.ravel()] - 1).astype(np.int32)
    stay = graph.inside(groups) - DUPLICATE_COST * copies
    parts = np.zeros(num_parts, np.int32)
    # What the loops read at random: two bytes where they suffice, so that it stays in the cache
    label: Any = np.uint16 if num_parts <= MOST_NARROW else np.uint32
    number: Any = np.int16 if DUPLICATE_COST * members.shape[1] < MOST_NARROW // 2 else np.int32
    return _State(
        graph.indptr, _pack(graph, in_place), targets.astype(np.int32), groups.astype(label), members, copies,
        stay.astype(number), stay[members].min(axis=1), np.zeros(count, number), np.full(num_parts, NOTHING),
        np.zeros(count + int(np.diff(graph.indptr).max()) * members.shape[1] + 1, np.uint32), parts.copy(),
        np.zeros(int(targets.max()) + 1, np.int32), np.zeros(num_parts + 1, np.uint32),
        np.zeros(num_parts + 1, np.uint32), bool((np.bincount(targets) > 1).any()),
    )  # fmt: skip


def _pack(graph: Graph, in_place: bool) -> np.ndarray:
    """(E,) uint32: twice the neighbour of each edge, and 1 more where the weight is 2."""
    edges = graph.indices.view(np.uint32) if in_place else graph.indices.astype(np.uint32)
    edges <<= 1
    for start in range(0, len(edges), BLOCK_EDGES):
        edges[start : start + BLOCK_EDGES] |= graph.weights[start : start + BLOCK_EDGES] == 2
    return edges


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True)(function)


@_jit
def _neighbour(edge):  # type: ignore[no-untyped-def]
    return edge >> np.uint32(1)


@_jit
def _weight(edge):  # type: ignore[no-untyped-def]
    return np.int32(1) + np.int32(edge & np.uint32(1))


@_jit
def _fetch(indptr, edges, row):  # type: ignore[no-untyped-def]
    """Ask for the edges of a row that is read soon: memory takes longer to answer than a row takes to work off."""
    for e in range(indptr[row], indptr[row + 1], 16):
        prefetch(edges, e)


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
def _between(indptr, edges, row, other):  # type: ignore[no-untyped-def]
    """Weight of the edge between two rows, 0 if there is none."""
    low, end = indptr[row], indptr[row + 1]
    high = end
    while low < high:
        middle = (low + high) >> 1
        if _neighbour(edges[middle]) < other:
            low = middle + 1
        else:
            high = middle
    return _weight(edges[low]) if low < end and _neighbour(edges[low]) == other else np.int32(0)


@_jit
def _copies(targets, members, row):  # type: ignore[no-untyped-def]
    """Members of a community other than `row` that have its target."""
    num = 0
    for v in members:
        if v != row and targets[v] == targets[row]:
            num += 1
    return num


@_jit
def _offer(pull, touched, num, part, offer):  # type: ignore[no-untyped-def]
    """Raise the `pull` of a community to an offer; returns the number of communities touched.

    Here and in the loops over edges there is no branch, whose outcome could not be foreseen: what is written last stays
    only if the number grows.
    """
    before = pull[part]
    touched[num] = part
    pull[part] = max(before, offer)
    return num + (before == NOTHING)


@_jit
def _enter(state, home):  # type: ignore[no-untyped-def]
    """Fill `in_home`, `to_home`, `pull` for the visited community; returns the numbers of rows and communities."""
    to_home, reached, far = state.to_home, state.reached, 0
    for i in state.members[home]:
        state.in_home[state.targets[i]] += 1
        for edge in state.edges[state.indptr[i] : state.indptr[i + 1]]:
            v = _neighbour(edge)
            reached[far] = v
            far += to_home[v] == 0
            to_home[v] += _weight(edge)
    num = 0
    for v in reached[:far]:
        num = _offer(state.pull, state.touched, num, state.groups[v], to_home[v] - state.stay[v])
    return far, num


@_jit
def _leave_home(state, home, far, num):  # type: ignore[no-untyped-def]
    """Clear what `_enter` filled."""
    for part in state.touched[:num]:
        state.pull[part] = NOTHING
    for v in state.reached[:far]:
        state.to_home[v] = 0
    least = state.stay[state.members[home, 0]]
    for i in state.members[home]:
        least = min(least, state.stay[i])
        state.in_home[state.targets[i]] = 0
    state.least[home] = least


@_jit
def _find_candidates(state, order, turn, row):  # type: ignore[no-untyped-def]
    """Fill `linked` and `candidates` for a row; returns the number of candidates, the own community included."""
    groups, linked, candidates, num = state.groups, state.linked, state.candidates, 0
    for edge in state.edges[state.indptr[row] : state.indptr[row + 1]]:
        part = groups[_neighbour(edge)]
        candidates[num] = part
        num += linked[part] == 0
        linked[part] += _weight(edge)
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
                gain -= 2 * _between(state.indptr, state.edges, row, v)
            if gain > best:
                best, partner = gain, v
    return best, partner


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
    _fetch(state.indptr, state.edges, j)
    groups, stay, to_home, away = state.groups, state.stay, state.to_home, state.groups[j]
    between = _between(state.indptr, state.edges, i, j)
    inside_i, inside_j = state.linked[away] - between, to_home[j] - between
    for edge in state.edges[state.indptr[i] : state.indptr[i + 1]]:
        v, w = _neighbour(edge), _weight(edge)
        part = groups[v]
        to_home[v] -= w
        stay[v] += w * (np.int32(part == away) - np.int32(part == home))
    for edge in state.edges[state.indptr[j] : state.indptr[j + 1]]:
        v, w = _neighbour(edge), _weight(edge)
        part = groups[v]
        state.reached[far] = v
        far += to_home[v] == 0
        to_home[v] += w
        stay[v] += w * (np.int32(part == home) - np.int32(part == away))
        num = _offer(state.pull, state.touched, num, part, to_home[v] - stay[v])
    stay[i], stay[j] = inside_i, inside_j
    state.copies[i], state.copies[j] = 0, 0
    state.in_home[state.targets[i]] -= 1
    state.in_home[state.targets[j]] += 1
    groups[i], groups[j] = away, home
    state.members[home, slot] = j
    for q in range(state.members.shape[1]):
        if state.members[away, q] == j:
            state.members[away, q] = i
    if state.crowded:
        _recount(state, home, cost)
        _recount(state, away, cost)
    least = stay[i]
    for v in state.members[away]:
        num = _offer(state.pull, state.touched, num, away, to_home[v] - stay[v])
        least = min(least, stay[v])
    state.least[away] = least
    return far, num


@_jit
def _pass(state, order, temperature, cost, stream):  # type: ignore[no-untyped-def]
    """One visit to every community in the given order; returns the gain of the objective."""
    total = 0
    for turn in range(order.size):
        home, following = order[turn], order[min(turn + 1, order.size - 1)]
        far, touched = _enter(state, home)
        for slot in range(state.members.shape[1]):
            _fetch(state.indptr, state.edges, state.members[following, slot])
            i = state.members[home, slot]
            num = _find_candidates(state, order, turn, i)
            floor = temperature * np.log(_uniform(stream)) if temperature > 0 else 0.0
            gain, j = _best_swap(state, i, home, num, cost, floor)
            if j >= 0:
                total += int(gain)
                far, touched = _swap(state, i, j, home, slot, cost, far, touched)
            for part in state.candidates[:num]:
                state.linked[part] = 0
        _leave_home(state, home, far, touched)
    return total
