"""Random communities: a seeded permutation of the rows, cut into pieces of K."""

from __future__ import annotations

import numpy as np

from b3.config.schema import MiningOptions
from b3.console import Clock
from b3.mining.graph import Problem, kept_rows
from b3.mining.vectors import seeded_order


def cut(problem: Problem, options: MiningOptions, clock: Clock) -> np.ndarray:
    """(n,) int64 community of each row, -1 for the n mod K rows in none; every community has exactly K rows."""
    with clock.stage("partition"):
        positions = kept_rows(None, len(problem), options.community_size, options.seed)
        return problem.place(positions, random_groups(len(positions), options.community_size, options.seed))


def random_groups(num_rows: int, community_size: int, seed: int) -> np.ndarray:
    """(n,) int64 community of each row; K divides n, or else the last one is smaller."""
    group_of = np.empty(num_rows, dtype=np.int64)
    group_of[seeded_order(seed, num_rows)] = np.arange(num_rows) // community_size
    return group_of
