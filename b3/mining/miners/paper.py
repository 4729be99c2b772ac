"""Mining as the paper's authors do it (arXiv 2505.11293, section 3.2, and their scripts): METIS and their repair.

Classification goes by the nearest labels, in subsets of the rows. Row ranks say nothing where many rows share a label:
the authors' code takes, for each query, the first 30 % of all labels in rank order, the gold one left out, joins the
query with every row of its subset that carries one of them, and keeps the edges that hold both ways. The graph is dense
(thousands of edges per row), hence their subsets of 10,000 rows.
"""

from __future__ import annotations

import numpy as np

from b3.config.schema import MiningOptions
from b3.console import Clock
from b3.errors import InputError, RunError
from b3.mining.graph import Graph, Problem, kept_rows, merge_facts
from b3.mining.miners.random import random_groups
from b3.mining.rankings import Rankings, rank_labels
from b3.mining.vectors import DistinctTargets, group_targets, mix64

SUBSET_ROWS = 10_000
BLOCK_VALUES = 1 << 24
MAX_EDGES = 200_000_000  # directed; 5 bytes each, and three times that while built


def cut(problem: Problem, options: MiningOptions, clock: Clock) -> np.ndarray:
    """(n,) int64 community of each row, -1 for a row in none; every community has exactly K rows."""
    if options.by_label:
        return _cut_by_label(problem, options, clock)
    return _cut_graph(problem, problem.graph, options, clock)


def _cut_graph(problem: Problem, graph: Graph, options: MiningOptions, clock: Clock) -> np.ndarray:
    size, seed = options.community_size, options.seed
    positions = kept_rows(graph, len(problem), size, seed)
    with clock.stage("partition"):
        num_parts = len(positions) // size
        parts = metis_parts(graph.restrict(positions), num_parts, seed)
        sizes = np.bincount(parts, minlength=num_parts)
        problem.facts |= {"partition_size_min": int(sizes.min()), "partition_size_max": int(sizes.max())}
        return problem.place(positions, authors_repair(parts, num_parts, size))


def metis_parts(graph: Graph, num_parts: int, seed: int) -> np.ndarray:
    """(n,) int64 part of each row by METIS, k-way with its defaults: minimum weighted cut, sizes only roughly equal.

    Raises `RunError` if pymetis is not installed.
    """
    count = len(graph)
    assert 0 < num_parts <= count
    if num_parts == count:
        return np.arange(count)
    if num_parts == 1:
        return np.zeros(count, dtype=np.int64)
    if graph.num_edges == 0:
        return random_groups(count, -(-count // num_parts), seed)
    try:
        import pymetis
    except ImportError:
        raise RunError("the paper's partitioner needs METIS; pip install 'b3[paper]'") from None
    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices.astype(np.int64))
    weights = None if (graph.weights == 1).all() else graph.weights.astype(np.int64)
    options = pymetis.Options(seed=int(mix64(seed, 4)[0] >> np.uint64(34)))  # METIS takes 31 bits
    result = pymetis.part_graph(num_parts, adjacency, eweights=weights, recursive=False, options=options)
    return np.asarray(result.vertex_part, dtype=np.int64)


def authors_repair(parts: np.ndarray, num_parts: int, community_size: int) -> np.ndarray:
    """(n,) int64: the last members of large parts move into any small part, whatever their edges; all have K rows then.

    Their padding of the last, short part is left out: it repeated the data set's first rows instead of its own.
    """
    order = np.argsort(parts, kind="stable")
    sizes = np.bincount(parts, minlength=num_parts)
    place = np.arange(len(parts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the part
    parts = parts.copy()
    parts[order[place >= community_size]] = np.repeat(
        np.arange(num_parts), community_size - np.minimum(sizes, community_size)
    )
    return parts


def _cut_by_label(problem: Problem, options: MiningOptions, clock: Clock) -> np.ndarray:
    """As `cut`, for class labels, in random subsets that are ranked and cut each on its own."""
    community_of = np.full(len(problem), -1, dtype=np.int64)
    facts, num_communities = [], 0
    for positions in split_rows(len(problem), SUBSET_ROWS, options.seed):
        rows = problem.rows[positions]
        distinct = restrict_targets(problem.distinct, rows)
        if len(rows) < options.community_size or len(distinct) == 1:
            continue
        queries = problem.queries[rows]
        with clock.stage("rank"):
            rankings = rank_labels(queries, distinct, options.m, options.community_size - 1, method=options.search)
        subset = Problem(queries, rankings, distinct, np.arange(len(rows)), options, clock)
        with clock.stage("graph"):
            graph = label_graph(rankings, distinct)
        subset.facts |= graph.facts()
        within = _cut_graph(subset, graph, options, clock)
        community_of[positions] = np.where(within >= 0, within + num_communities, -1)
        num_communities += len(rows) // options.community_size
        facts.append(subset.facts)
    if not facts:
        raise InputError(f"every subset of {SUBSET_ROWS} rows has one label only, so there are no negatives")
    problem.facts |= merge_facts(facts)
    return community_of


def split_rows(num_rows: int, subset_rows: int, seed: int) -> list[np.ndarray]:
    """The numbers below `num_rows` in random subsets of `subset_rows` (the last one smaller), each ascending."""
    order = np.argsort(mix64(seed, 8, np.arange(num_rows)), kind="stable")
    return [np.sort(order[start : start + subset_rows]) for start in range(0, num_rows, subset_rows)]


def restrict_targets(distinct: DistinctTargets, rows: np.ndarray) -> DistinctTargets:
    """The distinct targets of `rows` (ascending), renumbered in the same order."""
    present, of_row = np.unique(distinct.of_row[rows], return_inverse=True)
    return group_targets(distinct.vectors[present], of_row)


def label_graph(rankings: Rankings, distinct: DistinctTargets) -> Graph:
    """Join rows of which each has the other's label among its own `rankings` (of `rank_labels`); weight 1.

    Raises `InputError` if the graph could have more than 200 million directed edges.
    """
    labels, count = distinct.of_row, len(rankings)
    is_near = np.zeros((count, len(distinct)), dtype=bool)  # (N, U): label u is among the first of row i
    np.put_along_axis(is_near, rankings.order.astype(np.int64), True, axis=1)
    most = int((is_near @ distinct.counts.astype(np.float64)).sum())
    if most > MAX_EDGES:
        raise InputError(
            f"{count} rows and {len(distinct)} labels give up to {most:,} edges by label, above the limit of"
            f" {MAX_EDGES:,}; mine without preset paper"
        )
    degrees, neighbours = [], []
    step = max(1, BLOCK_VALUES // count)
    for start in range(0, count, step):
        span = slice(start, start + step)
        is_mutual = is_near[span][:, labels] & is_near[:, labels[span]].T
        degrees.append(is_mutual.sum(axis=1))
        neighbours.append(np.nonzero(is_mutual)[1].astype(np.int32))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(degrees))]).astype(np.int64)
    indices = np.concatenate(neighbours)
    return Graph(indptr, indices, np.ones(len(indices), dtype=np.int8))
