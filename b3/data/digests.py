"""Which of many rows are equal, by a digest of each in one array: a row costs bytes, not Python objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

SIZE = 16  # bytes; of a billion rows no two share a digest by chance


def digest(value: object) -> bytes:
    """128 bits of a value made of texts, numbers and tuples of them; equal values, equal digests."""
    return hashlib.blake2b(repr(value).encode(), digest_size=SIZE).digest()


def joined(digests: Iterable[bytes], size: int = SIZE) -> np.ndarray:
    """Digests of `size` bytes each as an array (N, size) uint8."""
    content = bytearray()
    for one in digests:
        content += one
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, size)


def first_seen(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of digests (N, w) uint8 are distinct, w a multiple of 8.

    Returns (first, number): the first row of each distinct one, (U,) int64 ascending, and (N,) int64 such that row i
    equals row ``first[number[i]]``.
    """
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(words.T)  # stable: equal rows stay in order
    is_new = np.ones(len(words), dtype=bool)
    is_new[1:] = False
    for word in words.T:
        in_order = word[order]
        is_new[1:] |= in_order[1:] != in_order[:-1]
    first = order[is_new]
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    number = np.empty(len(words), dtype=np.int64)
    number[order] = place[np.cumsum(is_new) - 1]
    return np.sort(first), number
