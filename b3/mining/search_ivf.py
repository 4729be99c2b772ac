"""Approximate search for very many targets: faiss finds candidates in an inverted file, exact scores rank them.

A query looks only into the cells whose centroids are nearest to it; what is elsewhere is not found, and the report of
the plan says how much that is (`b3.mining.rankings.search_recall`). Cells are trained on one thread from a fixed seed.
On 100,000 rows the exact search is faster (docs/log.md); this one is for many millions.
"""

from __future__ import annotations

import numpy as np

from b3.errors import RunError
from b3.mining.search import pair_scores

PROBED = 0.2  # share of the cells that a query looks into
LEAST_IN_CELL = 64
TRAINED_ON = 256  # targets a cell, at most


class CellSearch:
    """Search over `targets` (U, D), float32 unit vectors on the grid; called as `b3.mining.search.Search`.

    Raises `RunError` if faiss is not installed.
    """

    def __init__(self, targets: np.ndarray, depth: int) -> None:
        try:
            import faiss
        except ImportError:
            raise RunError("mining.search ivf needs faiss; pip install 'b3[faiss]', or use search exact") from None
        count, dim = targets.shape
        self.targets, self.depth = targets, depth
        cells = max(1, min(int(4 * count**0.5), count // LEAST_IN_CELL))
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.seed, self.index.cp.max_points_per_centroid = 1, TRAINED_ON
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        self.index.train(targets)
        faiss.omp_set_num_threads(threads)
        self.index.add(targets)
        self.index.nprobe = int(np.ceil(PROBED * cells))

    def __call__(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, ids = self.index.search(np.ascontiguousarray(queries), self.depth)
        for row in np.flatnonzero((ids < 0).any(axis=1)):  # fewer found than asked for: fill up with the first others
            missing = ids[row] < 0
            others = np.setdiff1d(np.arange(min(len(self.targets), 2 * self.depth)), ids[row])
            ids[row, missing] = others[: missing.sum()]
        ids.sort(axis=1)
        scores = pair_scores(queries, self.targets[ids])
        by_rank = np.argsort(-scores, axis=1, kind="stable")  # stable over sorted ids: ties by id
        return np.take_along_axis(ids, by_rank, axis=1), np.take_along_axis(scores, by_rank, axis=1)
