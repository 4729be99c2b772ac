"""Compiled loops over graphs in compressed rows: nothing is made that is as long as the edges but the result."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from b3.mining.search_kernels import place_of

REVERSE = 4  # added to the weight of a directed edge whose reverse is there too


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True)(function)


@_jit
def _holds(ascending, value):  # type: ignore[no-untyped-def]
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low < len(ascending) and ascending[low] == value


@_jit
def weigh(order, p, target_of, members, indptr, rows, is_union, veto, weights):  # type: ignore[no-untyped-def]
    """Fill the weight of each directed edge, 0 where it is dropped: see `b3.mining.graph.build_graph`.

    Args:
        order: (N, p + m) of the rankings; p; target_of: (N,) distinct target of each row.
        members: (n,) rows; indptr (n + 1,), rows (E,): directed edges, which are sorted here. weights: (E,) int8.
    """
    for i in range(len(members)):
        rows[indptr[i] : indptr[i + 1]].sort()
    for i in range(len(members)):
        target = target_of[members[i]]
        for e in range(indptr[i], indptr[i + 1]):
            j = rows[e]
            rank = place_of(order[members[j]], target)
            weight = 0
            if rank >= p:  # each has the other in its window
                weight = (2 if is_union else 1) + REVERSE * _holds(rows[indptr[j] : indptr[j + 1]], i)
            elif is_union and not (veto and rank >= 0):
                weight = 1
            weights[e] = weight


@_jit
def count_both(indptr, rows, weights):  # type: ignore[no-untyped-def]
    """(n + 1,) int64 `indptr` of the symmetric graph of directed edges with the weights of `weigh`."""
    ends = np.zeros(len(indptr), dtype=np.int64)
    for i in range(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            if weights[e]:
                ends[i + 1] += 1
                if weights[e] < REVERSE:
                    ends[rows[e] + 1] += 1
    return np.cumsum(ends)


@_jit
def fill_both(indptr, rows, weights, both_indptr, both_rows, both_weights):  # type: ignore[no-untyped-def]
    """Fill the symmetric graph, neighbours ascending, of an `indptr` of `count_both`."""
    ends = both_indptr[:-1].copy()
    for i in range(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            if not weights[e]:
                continue
            j, weight = rows[e], weights[e] % REVERSE
            both_rows[ends[i]], both_weights[ends[i]] = j, weight
            ends[i] += 1
            if weights[e] < REVERSE:
                both_rows[ends[j]], both_weights[ends[j]] = i, weight
                ends[j] += 1
    for i in range(len(indptr) - 1):
        part = slice(both_indptr[i], both_indptr[i + 1])
        pairs = np.sort(both_rows[part].astype(np.int64) * REVERSE + both_weights[part])
        both_rows[part], both_weights[part] = pairs // REVERSE, pairs % REVERSE


@_jit
def degrees(indptr, weights):  # type: ignore[no-untyped-def]
    """(n,) int64: sum of the weights at each row."""
    total = np.zeros(len(indptr) - 1, dtype=np.int64)
    for i in range(len(total)):
        for e in range(indptr[i], indptr[i + 1]):
            total[i] += weights[e]
    return total


@_jit
def inside(indptr, indices, weights, groups):  # type: ignore[no-untyped-def]
    """(n,) int32: the weight of each row's edges to rows of its own group."""
    total = np.zeros(len(groups), dtype=np.int32)
    for i in range(len(groups)):
        for e in range(indptr[i], indptr[i + 1]):
            if groups[indices[e]] == groups[i]:
                total[i] += weights[e]
    return total


@_jit
def restrict(indptr, indices, weights, rows, place, new_indices, new_weights):  # type: ignore[no-untyped-def]
    """(n + 1,) int64 `indptr` of the graph over `rows` (n,), numbered by `place` (N,), -1 for the others.

    Neighbours and weights go into the last two arguments, which may be the graph's own: what is written was read.
    """
    ends = np.zeros(len(rows) + 1, dtype=np.int64)
    num = 0
    for i in range(len(rows)):
        for e in range(indptr[rows[i]], indptr[rows[i] + 1]):
            j = place[indices[e]]
            if j >= 0:
                new_indices[num], new_weights[num] = j, weights[e]
                num += 1
        ends[i + 1] = num
    return ends
