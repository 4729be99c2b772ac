"""The graph against a dense reference; sampling where targets are shared by many rows."""

from __future__ import annotations

import numpy as np
import pytest
from mining import reference

from b3.mining.graph import build_graph, places
from b3.mining.graph import window_rows as directed_edges
from b3.mining.rankings import Rankings, rank_targets
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows


def window_rows(ranks: Rankings, distinct: DistinctTargets, budget: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    everyone = np.arange(len(ranks))
    return directed_edges(ranks, distinct, budget, seed, places(everyone, len(everyone)))


def prepare(queries: np.ndarray, targets: np.ndarray, p: int, m: int) -> tuple[Rankings, DistinctTargets]:
    distinct = distinct_targets(unit_rows(targets, "targets"))
    return rank_targets(unit_rows(queries, "queries"), distinct, p, m, 3), distinct


@pytest.mark.parametrize("labels", [None, 25])
@pytest.mark.parametrize(("edges", "veto"), [("union", True), ("union", False), ("mutual", True)])
def test_edges_equal_the_definition(edges: str, veto: bool, labels: int | None) -> None:
    queries, targets = reference.clustered(90, labels=labels)
    p, m = 3, 12
    ranks, distinct = prepare(queries, targets, p, m)
    graph = build_graph(ranks, distinct, edges, veto, budget=10_000, seed=0)
    number, orders = reference.distinct_of(targets), reference.ranking(queries, targets)
    assert np.array_equal(reference.dense(graph), reference.weights(orders, number, p, m, edges, veto))
    assert (graph.indptr.dtype, graph.indices.dtype, graph.weights.dtype) == (np.int64, np.int32, np.int8)


def test_weight_inside_a_part_counts_window_hits() -> None:
    queries, targets = reference.clustered(80)
    ranks, distinct = prepare(queries, targets, 0, 10)
    graph = build_graph(ranks, distinct, "union", False, 10, 0)
    hits = reference.window_hits(reference.ranking(queries, targets), np.arange(80), 0, 10)
    part = np.arange(0, 80, 3)
    assert graph.restrict(part).weights.sum() // 2 == hits[np.ix_(part, part)].sum()


def test_distinct_targets_are_never_sampled() -> None:
    queries, targets = reference.clustered(120)
    ranks, distinct = prepare(queries, targets, 2, 30)
    indptr, rows = window_rows(ranks, distinct, 30, seed=0)
    for i in range(120):
        assert set(rows[indptr[i] : indptr[i + 1]]) == set(ranks.order[i, 2:]) - {i}


@pytest.mark.parametrize("rows", [500, 4000])
def test_shared_targets_keep_about_m_edges_a_row_whatever_n_is(rows: int) -> None:
    queries, targets = reference.clustered(rows, labels=30)
    ranks, distinct = prepare(queries, targets, 3, 20)
    indptr, found = window_rows(ranks, distinct, 60, seed=1)
    assert abs(np.diff(indptr).mean() - 60) < 3
    sources = np.repeat(np.arange(rows), np.diff(indptr))
    hits = reference.window_hits(ranks.order.tolist(), distinct.of_row, 3, 20) if rows < 1000 else None
    assert (distinct.of_row[sources] != distinct.of_row[found]).all()
    assert len(set(zip(sources.tolist(), found.tolist(), strict=True))) == len(found)
    assert hits is None or hits[sources, found].all()
    again = window_rows(ranks, distinct, 60, seed=1)[1]
    assert np.array_equal(found, again)
    assert not np.array_equal(found, window_rows(ranks, distinct, 60, seed=2)[1])


def test_sampled_edges_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = reference.clustered(600, labels=30)
    ranks, distinct = prepare(queries, targets, 3, 20)
    whole = window_rows(ranks, distinct, 60, seed=1)
    monkeypatch.setattr("b3.mining.graph.EDGE_BLOCK", 400)
    parts = window_rows(ranks, distinct, 60, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_sampled_graph_is_symmetric_and_obeys_the_veto() -> None:
    queries, targets = reference.clustered(500, labels=30)
    ranks, distinct = prepare(queries, targets, 3, 15)
    graph = build_graph(ranks, distinct, "union", True, 40, 0)
    matrix = reference.dense(graph)
    full = reference.weights(reference.ranking(queries, targets), distinct.of_row, 3, 15, "union", True)
    assert np.array_equal(matrix, matrix.T)
    assert ((matrix == 0) | (matrix == full)).all()


def test_restrict_renumbers() -> None:
    queries, targets = reference.clustered(60)
    ranks, distinct = prepare(queries, targets, 2, 10)
    graph = build_graph(ranks, distinct, "union", True, 10, 0)
    rows = np.array([1, 4, 5, 20, 33, 59])
    assert np.array_equal(reference.dense(graph.restrict(rows)), reference.dense(graph)[np.ix_(rows, rows)])
    assert np.array_equal(graph.degrees(), reference.dense(graph).sum(axis=1))
