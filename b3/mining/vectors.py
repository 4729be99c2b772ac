"""Embeddings on an exact grid, and which targets are the same.

Every unit vector is rounded to multiples of 2**-26. Products of two such numbers are multiples of 2**-52 and, by
Cauchy-Schwarz, no partial sum of a dot product reaches 2, so float64 holds every intermediate result exactly: a score
does not depend on the order of summation, hence not on block sizes, threads, libraries or devices. The rounding (at
most 2**-27 per component) is below that of normalising in float32.

Random choices are seeded hashes of what is chosen, not a generator's stream: a stream would tie a plan to block sizes
and to the numpy version; a hash of (seed, row) ties it to neither.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from b3.data.digests import SIZE, first_seen, joined
from b3.errors import InputError
from b3.memory import room_for

GRID = 2.0**26
BLOCK_ROWS = 8192
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def check_arrays(queries: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays (N, D) of floats. Raises `InputError` saying what cannot be mined."""
    queries, targets = (a if isinstance(a, np.ndarray) else np.asarray(a) for a in (queries, targets))
    for side, array in (("queries", queries), ("targets", targets)):
        if array.ndim != 2 or array.shape[1] == 0:
            raise InputError(f"{side} have shape {array.shape}; give an array of shape (N, D)")
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(f"{side} have type {array.dtype}; give float16, float32 or float64")
    if len(queries) != len(targets):
        raise InputError(f"{len(queries)} queries but {len(targets)} targets; row i of both must be one training pair")
    if queries.shape[1] != targets.shape[1]:
        raise InputError(
            f"queries have {queries.shape[1]} dimensions, targets {targets.shape[1]}; use one teacher for both"
        )
    if len(queries) == 0:
        raise InputError("there are no rows to mine (N = 0)")
    return queries, targets


def unit_rows(array: np.ndarray, side: str) -> np.ndarray:
    """L2-normalise the rows of `array` (N, D), any float type and memory order; returns C-ordered float32 on the grid.

    Raises `InputError` naming `side` ("queries" or "targets") and the first row that is not finite or is zero.
    """
    units = room_for(array.shape, np.float32)
    for start in range(0, len(array), BLOCK_ROWS):
        block = np.array(array[start : start + BLOCK_ROWS], dtype=np.float64, order="C")
        scale = np.abs(block).max(axis=1)
        _refuse(~np.isfinite(scale), start, side, "has NaN or infinite values; encode it again or drop it")
        _refuse(scale == 0, start, side, "is a zero vector, which has no direction; encode it again or drop it")
        block /= scale[:, None]  # first, so that squares neither overflow nor vanish
        block /= np.sqrt(np.add.reduce(block * block, axis=1))[:, None]
        units[start : start + len(block)] = np.rint(block * GRID) / GRID + 0.0  # + 0.0 turns -0.0 into 0.0
    return units


def _refuse(bad: np.ndarray, start: int, side: str, what: str) -> None:
    if bad.any():
        more = f" ({int(bad.sum())} such rows in its block)" if bad.sum() > 1 else ""
        raise InputError(f"row {start + int(bad.argmax())} of the {side} {what}{more}")


def embeddings_fingerprint(*arrays: np.ndarray) -> str:
    """SHA-256 over type, shape and C-ordered bytes of each array, whatever its memory order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.newbyteorder('<').str}{array.shape}".encode())
        for start in range(0, len(array), BLOCK_ROWS):
            block = np.ascontiguousarray(array[start : start + BLOCK_ROWS])
            digest.update(block.astype(block.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class DistinctTargets:
    """The distinct rows of the targets, numbered by first occurrence (all distinct: number = row).

    Attributes:
        vectors: (U, D) float32, the distinct unit vectors.
        of_row: (N,) int64, the distinct target of each row.
        rows: (N,) int64, rows ordered by distinct target, then by row.
        starts: (U + 1,) int64; the rows of target u are ``rows[starts[u]:starts[u + 1]]``.
    """

    vectors: np.ndarray
    of_row: np.ndarray
    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def counts(self) -> np.ndarray:
        """(U,) int64: rows that carry each target."""
        return np.diff(self.starts)


def group_targets(vectors: np.ndarray, of_row: np.ndarray) -> DistinctTargets:
    """The distinct targets (U, D) that rows carry: number `of_row` (N,) each."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=len(vectors)))])
    return DistinctTargets(vectors, of_row, np.argsort(of_row, kind="stable"), starts)


def distinct_targets(units: np.ndarray) -> DistinctTargets:
    """Group the identical rows of `units` (N, D), float32 on the grid."""
    first, of_row = first_seen(joined(hashlib.blake2b(row.data, digest_size=SIZE).digest() for row in units))
    if len(first) < len(units):
        units = _taken(units, first)
    return group_targets(units, of_row)


def _taken(units: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``units[rows]``, where there is room for it."""
    taken = room_for((len(rows), units.shape[1]), units.dtype)
    for start in range(0, len(rows), BLOCK_ROWS):
        taken[start : start + BLOCK_ROWS] = units[rows[start : start + BLOCK_ROWS]]
    return taken


def _splitmix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix64(seed: int, *values: np.ndarray | int) -> np.ndarray:
    """uint64 hashes of `seed` and `values` (integers or integer arrays that broadcast)."""
    with np.errstate(over="ignore"):
        state = _splitmix(np.asarray(seed & _MASK, dtype=np.uint64)[None] + _GOLDEN)
        for value in values:
            state = _splitmix(state + _GOLDEN + np.asarray(value).astype(np.uint64))
    return state


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Hashes as float64 in the open interval (0, 1)."""
    return ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def seeded_order(seed: int, count: int) -> np.ndarray:
    """(count,) int64: the numbers below `count` in a random order that depends on `seed` only."""
    rows = np.arange(count, dtype=np.int64)
    return np.argsort(mix64(seed, rows), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Pairs:
    """What mining works on: (N, D) float32 unit queries on the grid, distinct targets, digest of the embeddings."""

    queries: np.ndarray
    distinct: DistinctTargets
    fingerprint: str

    def __len__(self) -> int:
        return len(self.queries)


def normalise(queries: np.ndarray, targets: np.ndarray) -> Pairs:
    """Teacher embeddings, each (N, D), on the grid. Raises `InputError` for a row that has no direction."""
    distinct = distinct_targets(unit_rows(targets, "targets"))
    return Pairs(unit_rows(queries, "queries"), distinct, embeddings_fingerprint(queries, targets))
