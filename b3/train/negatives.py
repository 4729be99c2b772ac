"""Hard negatives of a step, drawn for its whole batch (`negatives.scope: batch`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b3.mining.batch_negatives import BatchDraw
from b3.mining.plan import BatchPlan


class StepNegatives:
    """The hard negatives of a whole batch; equal on every rank, which then takes its slice.

    Rows of several data sets in one batch draw from their own data set.

    Args:
        plans: of each data set, mined with negatives of scope "batch".
        offsets: first row number of each data set.
        per_query: h.
        seed: of the draws.
    """

    def __init__(self, plans: Sequence[BatchPlan], offsets: np.ndarray, per_query: int, seed: int) -> None:
        self.draws = [BatchDraw(plan) for plan in plans]
        self.offsets, self.per_query, self.seed = np.asarray(offsets, dtype=np.int64), per_query, seed

    def __call__(self, step: int, rows: np.ndarray) -> np.ndarray:
        """(B, h) int64, row numbers within the data set of each of `rows` (B,), which count over all; -1: none."""
        datasets = np.searchsorted(self.offsets, rows, side="right") - 1
        drawn = np.empty((len(rows), self.per_query), dtype=np.int64)
        for dataset in np.unique(datasets).tolist():
            inside = datasets == dataset
            own = rows[inside] - self.offsets[dataset]
            drawn[inside] = self.draws[dataset](own, self.per_query, self.seed, step)
        return drawn
