"""What a plan is compared with: random communities of the same rows, and the recipe of the paper's authors."""

from __future__ import annotations

import numpy as np

from b3.mining.graph import build_graph
from b3.mining.partition import choose_remainder, communities_of, metis_labels, random_labels, reference_repair
from b3.mining.rankings import Ranks
from b3.mining.vectors import DistinctTargets


def random_communities(num_rows: int, community_size: int, seed: int) -> np.ndarray:
    """(C, K) communities of a seeded permutation: what the partitioner `random` gives."""
    left_out = choose_remainder(None, num_rows, community_size, seed)
    rows = np.setdiff1d(np.arange(num_rows), left_out)
    return communities_of(random_labels(len(rows), community_size, seed), rows, community_size)


def random_expectation(ranks: Ranks, distinct: DistinctTargets, community_size: int) -> dict[str, float]:
    """Expected counts for communities drawn at random from all N rows: (K - 1) / (N - 1) of what exists."""
    counts, num = distinct.counts, len(ranks.own)
    share = (community_size - 1) / max(1, num - 1)
    totals = np.zeros(2)
    for start in range(0, num, 8192):
        rows = slice(start, start + 8192)
        for side, targets in enumerate((ranks.window(rows), ranks.skipped(rows))):
            totals[side] += counts[targets][targets != ranks.own[rows, None]].sum()
    return {
        "mined_negatives_per_query": float(totals[0] / num * share),
        "skipped_ranks_per_query": float(totals[1] / num * share),
        "duplicate_targets_in_community": float((counts[ranks.own] - 1).mean() * share),
    }


def paper_communities(
    ranks: Ranks, distinct: DistinctTargets, community_size: int, budget: int, seed: int
) -> np.ndarray:
    """(C, K) communities by the recipe of arXiv 2505.11293, section 3.2, as its authors' code runs it.

    Mutual edges, METIS with its k-way defaults, and the authors' repair of the sizes: what the partitioner `paper`
    gives. `budget`: see `b3.mining.graph.window_rows`.
    """
    count = len(ranks.own)
    graph = build_graph(ranks, distinct, "mutual", True, budget, seed)
    rows = np.setdiff1d(np.arange(count), choose_remainder(graph, count, community_size, seed))
    parts = len(rows) // community_size
    labels = metis_labels(graph.restrict(rows), parts, seed)
    return communities_of(reference_repair(labels, parts, community_size), rows, community_size)
