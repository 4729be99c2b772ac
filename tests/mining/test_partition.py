"""Trim, METIS, repair and refinement on random graphs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mining import reference

from b3.mining.communities import members_of
from b3.mining.graph import Graph, kept_rows
from b3.mining.miners import anneal
from b3.mining.miners.anneal import DUPLICATE_COST, objective, refine, temperatures
from b3.mining.miners.paper import authors_repair, metis_parts
from b3.mining.miners.random import random_groups


def random_graph(rows: int, edges: int, seed: int) -> Graph:
    """A symmetric graph with weights 1 and 2; rows may be isolated."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((rows, rows), dtype=np.int64)
    a, b = rng.integers(0, rows, size=(2, edges))
    matrix[a, b] = rng.integers(1, 3, size=edges)
    matrix = np.maximum(matrix, matrix.T)
    np.fill_diagonal(matrix, 0)
    sources, indices = np.nonzero(matrix)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(sources, minlength=rows))])
    return Graph(indptr.astype(np.int64), indices.astype(np.int32), matrix[sources, indices].astype(np.int8))


def plain_objective(graph: Graph, labels: np.ndarray, targets: np.ndarray) -> int:
    matrix, total = reference.dense(graph), 0
    for i in range(len(labels)):
        for j in range(i):
            if labels[i] == labels[j]:
                total += matrix[i, j] - DUPLICATE_COST * (targets[i] == targets[j])
    return int(total)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 300), st.integers(0, 2**31), st.integers(1, 40))
def test_refinement_keeps_sizes_and_never_lowers_the_objective(
    shape: tuple[int, int], edges: int, seed: int, num_targets: int
) -> None:
    parts, size = shape
    rows = parts * size
    graph = random_graph(rows, edges, seed)
    targets = np.random.default_rng(seed).integers(0, num_targets, rows)
    before = random_groups(rows, size, seed)
    start = before.copy()
    after, gains = refine(graph, before, targets, size, 5, seed)
    assert np.array_equal(start, before)
    assert (np.bincount(after, minlength=parts) == size).all()
    assert sum(gains) >= 0
    assert objective(graph, after, targets) == objective(graph, before, targets) + sum(gains)
    assert objective(graph, after, targets) == plain_objective(graph, after, targets)


@pytest.mark.parametrize("narrow", [True, False])
@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 200), st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 8))
def test_swaps_are_those_of_the_plain_rule(
    narrow: bool, shape: tuple[int, int], edges: int, seed: int, num_targets: int, passes: int
) -> None:
    """Row for row, ties, copies and draws included, whatever the width of the numbers."""
    parts, size = shape[0] + 1, shape[1] + 1
    rows = parts * size
    graph = random_graph(rows, edges, seed)
    targets = np.random.default_rng(seed).integers(0, num_targets, rows)
    before = random_groups(rows, size, seed)
    plain = reference.swaps(reference.dense(graph), before, targets, temperatures(passes), seed, DUPLICATE_COST)
    with pytest.MonkeyPatch.context() as patch:
        if not narrow:
            patch.setattr(anneal, "MOST_NARROW", 0)
        groups, gains = refine(graph, before, targets, size, passes, seed)
    assert (groups.tolist(), gains) == ((plain[0].tolist(), plain[1]) if sum(plain[1]) > 0 else (before.tolist(), []))


@pytest.mark.parametrize("size", [4095, 4200])
def test_large_communities_of_copies_are_counted_exactly(size: int) -> None:
    """What a row contributes may lie below the least number of two bytes."""
    nothing = Graph(np.zeros(2 * size + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.int8))
    groups, targets = np.repeat([0, 1], size), np.zeros(2 * size, dtype=np.int64)
    assert (anneal._start(nothing, groups, targets, 2).stay == -DUPLICATE_COST * (size - 1)).all()


def test_refinement_ends_where_no_swap_gains() -> None:
    graph = random_graph(24, 90, 3)
    targets = np.arange(24)
    labels, gains = refine(graph, random_groups(24, 6, 0), targets, 6, 50, 0)
    assert gains[-1] == 0
    best = plain_objective(graph, labels, targets)
    for i in range(24):
        for j in range(i):
            swapped = labels.copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert plain_objective(graph, swapped, targets) <= best


def test_refinement_separates_equal_targets() -> None:
    graph = random_graph(40, 0, 0)
    targets = np.repeat(np.arange(8), 5)
    labels, _ = refine(graph, np.repeat(np.arange(5), 8), targets, 8, 30, 0)  # begins with them together
    assert len(np.unique(np.stack([labels, targets]), axis=1).T) == 40


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_the_repair_gives_exact_sizes(shape: tuple[int, int], seed: int) -> None:
    parts, size = shape
    labels = np.random.default_rng(seed).integers(0, parts, parts * size)
    repaired = authors_repair(labels, parts, size)
    assert (np.bincount(repaired, minlength=parts) == size).all()
    full = np.bincount(labels, minlength=parts) <= size
    assert (repaired[full[labels]] == labels[full[labels]]).all()  # only over-full parts give up rows


@pytest.mark.parametrize("edges", [0, 3, 200])
@pytest.mark.parametrize(("parts", "size"), [(1, 12), (12, 1), (2, 2), (6, 5), (20, 4)])
def test_metis_takes_any_graph(parts: int, size: int, edges: int) -> None:
    graph = random_graph(parts * size, edges, 1)
    labels = metis_parts(graph, parts, 7)
    assert labels.shape == (parts * size,) and labels.min() >= 0 and labels.max() < parts
    assert np.array_equal(labels, metis_parts(graph, parts, 7))


def test_the_remainder_is_the_least_connected_rows() -> None:
    graph = random_graph(23, 60, 0)
    rest = kept_rows(graph, 23, 5, 0)
    left = np.setdiff1d(np.arange(23), rest)
    assert left.shape == (3,) and (np.diff(rest) > 0).all()
    assert graph.degrees()[left].max() <= graph.degrees()[rest].min()
    assert kept_rows(None, 20, 5, 0).shape == (20,)


def test_communities_are_canonical() -> None:
    rows = np.array([2, 3, 5, 7, 8, 9])
    assert members_of(np.array([1, 0, 1, 0, 2, 2]), rows, 2).tolist() == [[2, 5], [3, 7], [8, 9]]
    with pytest.raises(AssertionError, match="communities of 1 to 3 rows"):
        members_of(np.array([0, 0, 0, 1, 2, 2]), rows, 2)
