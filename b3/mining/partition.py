"""Parts of the graph, METIS's and random ones, and the repair of their sizes to exactly K."""

from __future__ import annotations

import numpy as np

from b3.mining.graph import Graph
from b3.mining.hashing import mix64, seeded_order


def choose_remainder(graph: Graph | None, num_rows: int, community_size: int, seed: int) -> np.ndarray:
    """(N mod K,) int64, ascending: the rows left out; the least connected ones, ties by a seeded hash.

    Without a graph the choice is random.
    """
    surplus = num_rows % community_size
    degrees = np.zeros(num_rows, dtype=np.int64) if graph is None else graph.degrees()
    order = np.lexsort((mix64(seed, 3, np.arange(num_rows)), degrees))
    return np.sort(order[:surplus]).astype(np.int64)


def random_labels(num_rows: int, community_size: int, seed: int) -> np.ndarray:
    """(N,) int64 community of each row, a seeded permutation cut into exact pieces; K divides N."""
    labels = np.empty(num_rows, dtype=np.int64)
    labels[seeded_order(seed, num_rows)] = np.arange(num_rows) // community_size
    return labels


def metis_labels(graph: Graph, num_parts: int, seed: int) -> np.ndarray:
    """(N,) int64 part of each row by METIS: minimum weighted cut, sizes only roughly equal.

    K-way with its defaults, as the paper's scripts call it.
    """
    count = len(graph)
    assert 0 < num_parts <= count
    if num_parts == count:
        return np.arange(count)
    if num_parts == 1 or graph.num_edges == 0:
        return random_labels(count, -(-count // num_parts), seed) if num_parts > 1 else np.zeros(count, dtype=np.int64)
    import pymetis

    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices.astype(np.int64))
    weights = None if (graph.weights == 1).all() else graph.weights.astype(np.int64)
    options = pymetis.Options(seed=int(mix64(seed, 4)[0] >> np.uint64(34)))  # METIS takes 31 bits
    result = pymetis.part_graph(num_parts, adjacency, eweights=weights, recursive=False, options=options)
    return np.asarray(result.vertex_part, dtype=np.int64)


def reference_repair(labels: np.ndarray, num_parts: int, community_size: int) -> np.ndarray:
    """The authors' repair: the last members of large parts move into any small part, whatever their edges.

    Their padding of the last, short part is left out: it repeated the data set's first rows instead of its own.
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=num_parts)
    position = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    labels = labels.copy()
    labels[order[position >= community_size]] = np.repeat(
        np.arange(num_parts), community_size - np.minimum(sizes, community_size)
    )
    return labels


def communities_of(labels: np.ndarray, rows: np.ndarray, community_size: int) -> np.ndarray:
    """(C, K) int64: members ascending, communities by their first member; `labels` are those of `rows` (ascending)."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    assert (sizes == community_size).all(), f"communities of {sizes.min()} to {sizes.max()} rows, not {community_size}"
    members = rows[order].reshape(-1, community_size)
    return np.ascontiguousarray(members[np.argsort(members[:, 0], kind="stable")])
