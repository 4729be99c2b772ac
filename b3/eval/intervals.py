"""How far a precision@1 could move with other rows of the same kind: percentile bootstrap over rows.

Drawing n rows with replacement from n rows of which k are right gives a binomial number of right ones, so that each
draw is one binomial number and no row is copied. The interval covers the choice of rows, not that of the training run.
Where all rows (or none) are right it has no width.
"""

from __future__ import annotations

import numpy as np


def _draws(correct: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) float64 means of resampled rows."""
    assert correct.ndim == 1 and len(correct) > 0, "one value a row, at least one row"
    right = int(np.count_nonzero(correct))
    return rng.binomial(len(correct), right / len(correct), size=draws) / len(correct)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    assert 0 < level < 1, "level is a share such as 0.95"
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    correct: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the mean of `correct` ((rows,) bool): the precision@1 of one subset."""
    return _percentiles(_draws(correct, draws, np.random.default_rng(seed)), level)


def bootstrap_mean(
    correct_by_subset: dict[str, np.ndarray], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the plain mean over subsets; rows are drawn within each subset.

    The order of the subsets does not matter.
    """
    assert correct_by_subset, "at least one subset"
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for name in sorted(correct_by_subset):
        total += _draws(correct_by_subset[name], draws, rng)
    return _percentiles(total / len(correct_by_subset), level)
