"""Embeddings on an exact grid, and which targets are the same.

Every unit vector is rounded to multiples of 2**-26. Products of two such numbers are multiples of 2**-52 and, by
Cauchy-Schwarz, no partial sum of a dot product reaches 2, so float64 holds every intermediate result exactly: a score
does not depend on the order of summation, hence not on block sizes, threads, libraries or devices. The rounding (at
most 2**-27 a component) is below that of normalising in float32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from b3.errors import InputError
from b3.mining.hashing import mix64

GRID = 2.0**26
BLOCK_ROWS = 8192


def unit_rows(array: np.ndarray, side: str) -> np.ndarray:
    """L2-normalise the rows of `array` (N, D), any float type and memory order; returns C-ordered float32 on the grid.

    Raises `InputError` naming `side` ("queries" or "targets") and the first row that is not finite or is zero.
    """
    units = np.empty(array.shape, dtype=np.float32)
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

    @property
    def all_distinct(self) -> bool:
        return len(self.vectors) == len(self.of_row)


def distinct_targets(units: np.ndarray) -> DistinctTargets:
    """Group the identical rows of `units` (N, D), float32 on the grid."""
    first = _first_equal(units)
    heads = np.flatnonzero(first == np.arange(len(units)))
    of_row = np.searchsorted(heads, first)
    rows = np.argsort(of_row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=len(heads)))])
    vectors = units if len(heads) == len(units) else units[heads]
    return DistinctTargets(vectors, of_row.astype(np.int64), rows.astype(np.int64), starts.astype(np.int64))


def _first_equal(units: np.ndarray) -> np.ndarray:
    """(N,) number of the first row equal to each row: by hash, then checked, so a collision cannot pass."""
    count, dim = units.shape
    seed = 0
    while True:
        weights = mix64(seed, np.arange(dim)) | np.uint64(1)
        hashes = np.empty(count, dtype=np.uint64)
        for start in range(0, count, BLOCK_ROWS):
            block = (units[start : start + BLOCK_ROWS].astype(np.float64) * GRID).astype(np.int64).view(np.uint64)
            hashes[start : start + len(block)] = np.add.reduce(block * weights, axis=1, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        new = np.concatenate([[True], hashes[order][1:] != hashes[order][:-1]])
        first = np.empty(count, dtype=np.int64)
        first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
        repeats = np.flatnonzero(first != np.arange(count))
        if all(
            np.array_equal(units[part], units[first[part]])
            for part in np.array_split(repeats, max(1, len(repeats) // BLOCK_ROWS))
        ):
            return first
        seed += 1
