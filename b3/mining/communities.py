"""From ranks to communities: build the graph, choose the remainder, cut, and improve the cut."""

from __future__ import annotations

from typing import Any

import numpy as np

from b3.console import Clock
from b3.mining.graph import Graph, build_graph
from b3.mining.labels import label_graph
from b3.mining.parameters import Parameters
from b3.mining.partition import choose_remainder, communities_of, metis_labels, random_labels, reference_repair
from b3.mining.rankings import Ranks
from b3.mining.vectors import DistinctTargets


def find_communities(
    queries: np.ndarray, ranks: Ranks, distinct: DistinctTargets, cut: Parameters, clock: Clock
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(communities (C, K), remainder (N mod K,), facts for the report).

    Args:
        queries: (N, D) float32 on the grid, for k-means.
    """
    count = len(ranks.own)
    if cut.partitioner == "random":
        with clock.stage("partition"):
            remainder = choose_remainder(None, count, cut.K, cut.seed)
            rows = np.setdiff1d(np.arange(count), remainder)
            return communities_of(random_labels(len(rows), cut.K, cut.seed), rows, cut.K), remainder, {}
    facts: dict[str, Any] = {}
    if cut.partitioner == "kmeans" or (cut.piece_rows is not None and count > cut.piece_rows):
        remainder = choose_remainder(None, count, cut.K, cut.seed)
        rows = np.setdiff1d(np.arange(count), remainder)
        labels = _by_similarity(queries, rows, ranks, distinct, cut, clock, facts)
    else:
        with clock.stage("graph"):
            if cut.target_unit == "label30":
                graph = label_graph(ranks, distinct)
            else:
                graph = build_graph(ranks, distinct, cut.edges, cut.veto, cut.budget(count), cut.seed)
            remainder = choose_remainder(graph, count, cut.K, cut.seed)
            rows = np.setdiff1d(np.arange(count), remainder)
            facts |= {"edges": graph.num_edges, "isolated_rows": int((np.diff(graph.indptr) == 0).sum())}
            graph = graph.restrict(rows)
        labels = _cut(graph, distinct.of_row[rows], cut, clock, facts)
    return communities_of(labels, rows, cut.K), remainder, facts


def _by_similarity(
    queries: np.ndarray,
    rows: np.ndarray,
    ranks: Ranks,
    distinct: DistinctTargets,
    cut: Parameters,
    clock: Clock,
    facts: dict[str, Any],
) -> np.ndarray:
    """(n,) community of each of `rows` by balanced k-means: to communities, or to pieces that are cut one by one."""
    from b3.mining.miners.kmeans import balanced_kmeans, pair_vectors

    whole = cut.partitioner == "kmeans"
    with clock.stage("partition" if whole else "pieces"):
        vectors = pair_vectors(queries, distinct)
        pieces = len(rows) // cut.K if whole else -(-len(rows) // (cut.piece_rows or len(rows)))
        piece = balanced_kmeans(vectors, rows, pieces, cut.K, cut.seed)
    if whole:
        return piece
    facts |= {"pieces": pieces, "edges": 0, "isolated_rows": 0}
    labels = np.empty(len(rows), dtype=np.int64)
    first = 0
    for number in range(pieces):
        inside = np.flatnonzero(piece == number)
        members = rows[inside]
        with clock.stage("graph"):
            wide = cut.budget(len(ranks.own))
            graph = build_graph(ranks, distinct, cut.edges, cut.veto, wide, cut.seed, members)
        facts["edges"] += graph.num_edges
        facts["isolated_rows"] += int((np.diff(graph.indptr) == 0).sum())
        labels[inside] = first + _cut(graph, distinct.of_row[members], cut, clock, {})
        first += len(members) // cut.K
    return labels


def _cut(graph: Graph, targets: np.ndarray, cut: Parameters, clock: Clock, facts: dict[str, Any]) -> np.ndarray:
    """(n,) community of each row of a graph over n rows with distinct targets `targets` (n,); K divides n."""
    parts = len(graph) // cut.K
    with clock.stage("partition"):
        if cut.partitioner == "anneal":
            labels = random_labels(len(graph), cut.K, cut.seed)
        else:
            labels = metis_labels(graph, parts, cut.seed)
            sizes = np.bincount(labels, minlength=parts)
            facts |= {"partition_size_min": int(sizes.min()), "partition_size_max": int(sizes.max())}
            return reference_repair(labels, parts, cut.K)
    if not cut.refine_passes:
        return labels
    from b3.mining.miners.anneal import objective, refine

    with clock.stage("refine"):
        before = objective(graph, labels, targets)
        labels, gains = refine(graph, labels, targets, cut.K, cut.refine_passes, cut.seed, clock.progress)
        facts |= {"objective_before_refinement": before, "refinement_gains": gains}
    return labels
