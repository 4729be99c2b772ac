"""Seeded hashes: random choices that depend on what is chosen, not on the order of the work.

A generator's stream would tie a plan to block sizes and to the numpy version; a hash of (seed, row) ties it to neither.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


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
