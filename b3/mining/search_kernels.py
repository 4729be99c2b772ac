"""Compiled loops: candidates out of tiles of rough scores, their exact ranking, and where a target is ranked.

Rough scores arrive as the bits of bfloat16 (int16) or float32 (int32), or as products of integers (int32). Flipping the
lower bits of negative floats gives keys that order as the floats do, so that a comparison of integers finds candidates;
integers are their own keys, each worth the `unit` of its query, which is 0 for floats. All functions release the
interpreter's lock and write only to the rows that they are given.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from b3.mining.prefetch import prefetch

AHEAD = 4  # candidates whose vectors are asked for early
NO_FLOOR = np.iinfo(np.int64).min


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True)(function)


@_jit
def _value(key, narrow, unit):  # type: ignore[no-untyped-def]
    """The score that a key stands for; `narrow`: bfloat16."""
    bits = np.int64(key)
    if unit > 0:
        return bits * unit
    if bits < 0:
        bits = bits ^ (0x7FFF if narrow else 0x7FFFFFFF)
    if narrow:
        bits = bits << 16
    return np.float64(np.array([bits & 0xFFFFFFFF]).astype(np.uint32).view(np.float32)[0])


@_jit
def _key(value, narrow, unit):  # type: ignore[no-untyped-def]
    """A key below that of every score of at least `value`, by at most two."""
    if unit > 0:
        return np.int64(np.floor(value / unit)) - 1
    bits = np.int64(np.array([value]).astype(np.float32).view(np.int32)[0])
    if bits < 0:
        bits = bits ^ 0x7FFFFFFF
    bits -= 1  # the conversion to float32 may have rounded up
    return (bits >> 16) - 1 if narrow else bits - 1


@_jit
def _floor(keys, depth, error, result_error, narrow, unit):  # type: ignore[no-untyped-def]
    """Key up to which no target can belong to the top `depth`, given the keys of at least `depth` others.

    With r the depth-th best rough score before its rounding, at least `depth` targets score r - e exactly; one that
    reaches this has a rough score of at least r - 2e before its own rounding.
    """
    best = _value(np.partition(keys, len(keys) - depth)[len(keys) - depth], narrow, unit)
    lowest = best - 1.01 * result_error * abs(best) - 2 * error
    return _key(lowest - 1.01 * result_error * abs(lowest), narrow, unit)


@_jit
def _thin_out(keys, ids, count, floor):  # type: ignore[no-untyped-def]
    """Move the candidates above a floor to the front; returns their number."""
    num = 0
    for c in range(count):
        if keys[c] > floor:
            keys[num], ids[num] = keys[c], ids[c]
            num += 1
    return num


@_jit
def _any_above(scores, start, floor):  # type: ignore[no-untyped-def]
    """Whether one of 64 scores exceeds the floor: a loop without branches, which compiles to vector instructions."""
    flag = np.int16(0)
    for j in range(64):
        flag |= np.int16(scores[np.uint64(start + j)] > floor)
    return flag != 0


@_jit
def _add(scores, first, floor, low, flip, keys, ids, count):  # type: ignore[no-untyped-def]
    """Append what exceeds the floor; returns the number of candidates. `low`: the floor in the type of the scores."""
    for start in range(0, len(scores), 64):
        end = min(start + 64, len(scores))
        # The bits of a negative score are below any floor of at least 0, flipped or not.
        if floor >= 0 and end - start == 64 and not _any_above(scores, start, low):
            continue
        for j in range(start, end):
            bits = np.int64(scores[j])
            key = bits if bits >= 0 else bits ^ flip
            if key > floor:
                keys[count], ids[count] = key, first + j
                count += 1
    return count


@_jit
def _first_floor(scores, depth, flip, error, result_error, narrow, unit):  # type: ignore[no-untyped-def]
    """The `_floor` of a first tile, from the largest scores of 4 depth groups of it: near that of all, for less."""
    groups = 4 * depth
    best = scores[:groups].copy()
    for start in range(groups, len(scores) - groups + 1, groups):
        for g in range(groups):
            best[g] = max(best[g], scores[np.uint64(start + g)])
    for g in range(groups):
        if best[g] < 0:
            best[g] ^= flip
    return _floor(best, depth, error, result_error, narrow, unit)


@_jit
def collect(tile, first, keys, ids, counts, floors, error, result_error, unit, depth, most):  # type: ignore[no-untyped-def]
    """Add the targets of a tile that may belong to the top `depth` of each query.

    Args:
        tile: (n, T) rough scores of targets first, first + 1, ..., as above; unit: (n,).
        keys, ids (n, room), counts (n,), floors (n,): candidates so far : see `b3.mining.search.TileSearch`, changed.
        error: (n,) of a rough score before its own rounding; `result_error`: that rounding, relative.
        most: candidates of a query before they are thinned out. A query with more left than the room allows gets a
            count of -1.
    """
    narrow = tile.itemsize == 2
    for i in range(tile.shape[0]):
        if counts[i] < 0 or counts[i] + tile.shape[1] > keys.shape[1]:
            counts[i] = -1
            continue
        flip = 0 if unit[i] > 0 else 0x7FFF if narrow else 0x7FFFFFFF
        if floors[i] == NO_FLOOR and tile.shape[1] >= 4 * depth:
            floors[i] = _first_floor(tile[i], depth, flip, error[i], result_error, narrow, unit[i])
        low = tile[i, :1].copy()
        low[0] = max(floors[i], 0)
        count = _add(tile[i], first, floors[i], low[0], flip, keys[i], ids[i], counts[i])
        if count > most:
            floors[i] = max(floors[i], _floor(keys[i, :count], depth, error[i], result_error, narrow, unit[i]))
            count = _thin_out(keys[i], ids[i], count, floors[i])
        counts[i] = count


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(a, b):  # type: ignore[no-untyped-def]
    """Exact float64 dot product of float32 vectors on the grid: no order of summation rounds."""
    total = 0.0
    for k in range(len(a)):
        total += np.float64(a[k]) * np.float64(b[k])
    return total


@_jit
def _fetch(vectors, row):  # type: ignore[no-untyped-def]
    """Ask for a row of (n, D) float32 vectors."""
    for start in range(0, vectors.shape[1], 16):
        prefetch(vectors, row * vectors.shape[1] + start)


@_jit
def finish(queries, targets, keys, ids, counts, error, result_error, unit, best_ids, best_scores):  # type: ignore[no-untyped-def]
    """Rank the candidates of each query by exact score, ties by id; rows with a count of -1 are left alone.

    Args:
        queries (n, D), targets (U, D): float32 on the grid.
        keys, ids, counts, error, result_error, unit: as in `collect`.
        best_ids (n, depth) int64, best_scores (n, depth) float64: the result.
    """
    narrow = keys.itemsize == 2
    depth = best_ids.shape[1]
    for i in range(len(queries)):
        if counts[i] < 0:
            continue
        floor = _floor(keys[i, : counts[i]], depth, error[i], result_error, narrow, unit[i])
        count = _thin_out(keys[i], ids[i], counts[i], floor)
        candidates = np.sort(ids[i, :count])  # then a stable sort by score breaks ties by id
        scores = np.empty(count)
        for c in range(count):
            _fetch(targets, candidates[min(c + AHEAD, count - 1)])
            scores[c] = -_dot(queries[i], targets[candidates[c]])
        order = np.argsort(scores, kind="mergesort")[:depth]
        for c in range(depth):
            best_ids[i, c], best_scores[i, c] = candidates[order[c]], -scores[order[c]]


@_jit
def place_of(ids, wanted):  # type: ignore[no-untyped-def]
    """The place of a number in distinct ids (k,) int32, -1 if it has none: a maximum, as a loop that breaks is slow."""
    target, place = np.int32(wanted), np.int32(-1)
    for k in range(len(ids)):
        place = max(place, np.int32(k) if ids[k] == target else np.int32(-1))
    return place


@_jit
def rank_of(order, rows, targets):  # type: ignore[no-untyped-def]
    """(E,) int32: the column of row ``rows[e]`` of `order` (N, k) that holds ``targets[e]``, -1 if none does."""
    ranks = np.empty(len(rows), dtype=np.int32)
    for e in range(len(rows)):
        ranks[e] = place_of(order[rows[e]], targets[e])
    return ranks
