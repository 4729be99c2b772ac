"""How far vectors of another library lie from ours, by a measure that would see an error of 1 %."""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-4


def distance(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest difference of unit vectors (N, D); those turned by 1 % must be far beyond the tolerance."""
    off = ours + 0.01 * np.roll(ours, 1, axis=1)
    assert np.abs(theirs - off / np.linalg.norm(off, axis=1, keepdims=True)).max() > 10 * TOLERANCE
    return float(np.abs(theirs - ours).max())
