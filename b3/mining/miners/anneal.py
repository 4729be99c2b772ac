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
    return state.rows[:, GROUP].astype(np.int64), gains


class _State(NamedTuple):
    """Arrays that the passes share; N rows, C communities, U targets; int32 unless said.

    What a visit reads of a row, or of a community, lies side by side: its time is that of fetching it. Indices are
    unsigned, which spares the compiled code a look at their sign.
    """

    indptr: np.ndarray  # int64
    indices: np.ndarray  # uint32
    weights: np.ndarray  # int8
    rows: np.ndarray  # (N, 4): `GROUP`, `TO_HOME`, `STAY`, `TARGET`
    copies: np.ndarray  # (N,) other members of the own community with the same target
    members: np.ndarray  # (C, K) uint32
    parts: np.ndarray  # (C, 4): `LEAST`, `PULL`, `LINKED`, `SEEN`
    in_home: np.ndarray  # (U,) members of the visited community with each target, 0 outside a visit
    touched: np.ndarray  # (C,) uint32, room for the communities with a `PULL`
    candidates: np.ndarray  # (C,) uint32, room for the communities that a row could move to
    bounds: np.ndarray  # (C,) room for the most that each of them could gain
    crowded: bool  # whether any target occurs twice


# Of a row: its community; its weight to the visited community, 0 outside a visit; what it contributes where it is, that
# is its weight to its community minus the cost of copies; its target.
GROUP, TO_HOME, STAY, TARGET = 0, 1, 2, 3
# Of a community: the smallest `STAY` of its members, or less; the largest `TO_HOME - STAY` of the members with an edge
# to the visited community, or more, `NOTHING` without one; its weight to the row being moved; whether that is set.
LEAST, PULL, LINKED, SEEN = 0, 1, 2, 3


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
    rows = np.stack([groups, np.zeros_like(groups), stay, targets], axis=1).astype(np.int32)
    parts = np.zeros((num_parts, 4), dtype=np.int32)
    parts[:, LEAST], parts[:, PULL] = stay[members].min(axis=1), NOTHING
    room = np.zeros(num_parts, dtype=np.uint32)
    return _State(
        graph.indptr, graph.indices.astype(np.uint32), graph.weights, rows, copies, members, parts,
        np.zeros(int(targets.max()) + 1, np.int32), room, room.copy(), np.zeros(num_parts, np.int32),
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
def _weight(state, row, other):  # type: ignore[no-untyped-def]
    """Weight of the edge between two rows, 0 if there is none."""
    low, end = state.indptr[row], state.indptr[row + 1]
    high = end
    while low < high:
        middle = (low + high) >> 1
        if state.indices[middle] < other:
            low = middle + 1
        else:
            high = middle
    return np.int32(state.weights[low]) if low < end and state.indices[low] == other else np.int32(0)


@_jit
def _copies(state, part, row):  # type: ignore[no-untyped-def]
    """Members of a community other than `row` that have its target."""
    num, target = 0, state.rows[row, TARGET]
    for k in range(state.members.shape[1]):
        v = state.members[part, k]
        if v != row and state.rows[v, TARGET] == target:
            num += 1
    return num


@_jit
def _offer(state, row, num):  # type: ignore[no-untyped-def]
    """Raise the `PULL` of a row's community to what the row offers; returns the number of communities touched."""
    part, offer = np.uint32(state.rows[row, GROUP]), state.rows[row, TO_HOME] - state.rows[row, STAY]
    if offer > state.parts[part, PULL]:
        if state.parts[part, PULL] == NOTHING:
            state.touched[num] = part
            num += 1
        state.parts[part, PULL] = offer
    return num


@_jit
def _enter(state, home):  # type: ignore[no-untyped-def]
    """Fill `in_home`, `TO_HOME`, `PULL` for the visited community; returns the number of communities with a `PULL`."""
    num = 0
    for k in range(state.members.shape[1]):
        i = state.members[home, k]
        state.in_home[state.rows[i, TARGET]] += 1
        for e in range(state.indptr[i], state.indptr[i + 1]):
            v = state.indices[e]
            state.rows[v, TO_HOME] += state.weights[e]
            num = _offer(state, v, num)  # the last one for each row is the whole
    return num


@_jit
def _leave_home(state, home, num):  # type: ignore[no-untyped-def]
    """Clear what `_enter` filled."""
    for k in range(num):
        state.parts[state.touched[k], PULL] = NOTHING
    least = state.rows[state.members[home, 0], STAY]
    for k in range(state.members.shape[1]):
        i = state.members[home, k]
        least = min(least, state.rows[i, STAY])
        state.in_home[state.rows[i, TARGET]] = 0
        for e in range(state.indptr[i], state.indptr[i + 1]):
            state.rows[state.indices[e], TO_HOME] = 0
    state.parts[home, LEAST] = least


@_jit
def _find_candidates(state, order, turn, row):  # type: ignore[no-untyped-def]
    """Fill `LINKED`, `SEEN`, `candidates` for a row; returns the number of candidates, the own community included."""
    num = 0
    for e in range(state.indptr[row], state.indptr[row + 1]):
        part = np.uint32(state.rows[state.indices[e], GROUP])
        if state.parts[part, SEEN] == 0:
            state.parts[part, SEEN] = 1
            state.parts[part, LINKED] = 0
            state.candidates[num] = part
            num += 1
        state.parts[part, LINKED] += state.weights[e]
    if state.copies[row] == 0:
        return num
    for k in range(1, 9):  # away from a copy, a community without an edge may do: try some
        part = np.uint32(order[(turn + (k if order.size < 10 else k * k * 7919)) % order.size])  # few: each of them
        if state.parts[part, SEEN] == 0:
            state.parts[part, SEEN] = 1
            state.parts[part, LINKED] = 0
            state.candidates[num] = part
            num += 1
    return num


@_jit
def _best_member(state, row, away, cost, best):  # type: ignore[no-untyped-def]
    """The first member of a community with which a swap of `row` gains most, above `best`: (gain, slot or -1)."""
    side, slot = state.parts[away, LINKED] - state.rows[row, STAY], -1
    there = _copies(state, away, row) if state.crowded else 0
    for k in range(state.members.shape[1]):
        v = state.members[away, k]
        # both rows gain what they find minus what they leave; the edge between them is lost twice
        gain = side + state.rows[v, TO_HOME] - state.rows[v, STAY]
        if gain <= best:
            continue
        if state.crowded:
            same = 1 if state.rows[v, TARGET] == state.rows[row, TARGET] else 0
            gain -= cost * (there - same + state.in_home[state.rows[v, TARGET]] - same)
        if state.rows[v, TO_HOME] != 0:
            gain -= 2 * _weight(state, row, v)
        if gain > best:
            best, slot = gain, k
    return best, slot


@_jit
def _best_swap(state, row, home, num, cost, floor):  # type: ignore[no-untyped-def]
    """The swap of `row` that gains most, above `floor`: (gain, community, slot), slot -1 if there is none.

    Of equal gains the first candidate counts. Bounds decide what need not be looked at, and the candidate with the
    largest bound is looked at first: mostly none of the others can gain as much.
    """
    first, most = -1, floor
    for k in range(num):
        away = state.candidates[k]
        # No member offers more than `PULL` (those with an edge to the visited community) or `-LEAST` (the others).
        offer = max(state.parts[away, PULL], -state.parts[away, LEAST])
        state.bounds[k] = state.parts[away, LINKED] - state.rows[row, STAY] + offer
        if away != home and state.bounds[k] > most:
            first, most = k, np.float64(state.bounds[k])
    if first < 0:
        return floor, 0, -1
    best, slot = _best_member(state, row, state.candidates[first], cost, floor)
    place = first if slot >= 0 else num
    for k in range(num):
        # an earlier candidate wins with an equal gain, a later one must gain more
        limit = best - 1 if k < place < num else best
        if k != first and state.candidates[k] != home and state.bounds[k] > limit:
            gain, found = _best_member(state, row, state.candidates[k], cost, limit)
            if found >= 0:
                best, slot, place = gain, found, k
    return best, state.candidates[place] if place < num else 0, slot


@_jit
def _recount(state, part, cost):  # type: ignore[no-untyped-def]
    """Count the copies in a community again."""
    for k in range(state.members.shape[1]):
        v = state.members[part, k]
        copies = _copies(state, part, v)
        state.rows[v, STAY] -= cost * (copies - state.copies[v])
        state.copies[v] = copies


@_jit
def _leave(state, row, other, home, away):  # type: ignore[no-untyped-def]
    """Account for `row` going from `home`, the visited community, to `away` in its neighbours, `other` excepted."""
    for e in range(state.indptr[row], state.indptr[row + 1]):
        v, w = state.indices[e], state.weights[e]
        state.rows[v, TO_HOME] -= w
        if v != other:
            if state.rows[v, GROUP] == home:
                state.rows[v, STAY] -= w
            elif state.rows[v, GROUP] == away:
                state.rows[v, STAY] += w


@_jit
def _join(state, row, other, home, away, num):  # type: ignore[no-untyped-def]
    """The same for a row that comes to `home` from `away`; its neighbours offer anew."""
    for e in range(state.indptr[row], state.indptr[row + 1]):
        v, w = state.indices[e], state.weights[e]
        state.rows[v, TO_HOME] += w
        if v != other:
            if state.rows[v, GROUP] == away:
                state.rows[v, STAY] -= w
            elif state.rows[v, GROUP] == home:
                state.rows[v, STAY] += w
        num = _offer(state, v, num)
    return num


@_jit
def _swap(state, home, slot, away, place, cost, num):  # type: ignore[no-untyped-def]
    """Exchange two rows by their communities and slots; returns the number of communities touched."""
    i, j = state.members[home, slot], state.members[away, place]
    between = _weight(state, i, j)
    inside_i, inside_j = state.parts[away, LINKED] - between, state.rows[j, TO_HOME] - between
    _leave(state, i, j, home, away)
    state.rows[i, STAY], state.rows[j, STAY] = inside_i, inside_j
    state.copies[i], state.copies[j] = 0, 0
    state.rows[i, GROUP], state.rows[j, GROUP] = away, home
    num = _join(state, j, i, home, away, num)
    state.in_home[state.rows[i, TARGET]] -= 1
    state.in_home[state.rows[j, TARGET]] += 1
    state.members[home, slot], state.members[away, place] = j, i
    if state.crowded:
        _recount(state, home, cost)
        _recount(state, away, cost)
    least = state.rows[i, STAY]
    for k in range(state.members.shape[1]):
        v = state.members[away, k]
        num = _offer(state, v, num)
        least = min(least, state.rows[v, STAY])
    state.parts[away, LEAST] = least
    return num


@_jit
def _pass(state, order, temperature, cost, stream):  # type: ignore[no-untyped-def]
    """One visit to every community in the given order; returns the gain of the objective."""
    total = 0
    for turn in range(order.size):
        home = np.uint32(order[turn])
        touched = _enter(state, home)
        for slot in range(state.members.shape[1]):
            i = state.members[home, slot]
            num = _find_candidates(state, order, turn, i)
            floor = temperature * np.log(_uniform(stream)) if temperature > 0 else 0.0
            gain, away, place = _best_swap(state, i, home, num, cost, floor)
            if place >= 0:
                total += int(gain)
                touched = _swap(state, home, slot, np.uint32(away), place, cost, touched)
            for k in range(num):
                state.parts[state.candidates[k], SEEN] = 0
        _leave_home(state, home, touched)
    return total
