"""The method again in plain dense numpy, at small N; nothing of `b3.mining` is used on the side of the reference.

Two kinds of data. `signs`: vectors of +1 and -1 in 16 dimensions, so every score is an integer / 16 and rankings are
full of ties. `gauss`: real vectors. Each with all targets distinct, or with repeated ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from b3.mining import BatchPlan, mine
from b3.mining.graph import Graph, build_graph
from b3.mining.miners.anneal import DUPLICATE_COST, objective, refine
from b3.mining.miners.random import random_groups
from b3.mining.rankings import Rankings, rank_targets
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows

pytestmark = pytest.mark.core

KINDS = [("signs", True), ("signs", False), ("gauss", True), ("gauss", False)]
WINDOWS = [(0, 1), (0, 9), (3, 10), (7, 1), (5, 1000)]
both = pytest.mark.parametrize(("kind", "distinct"), KINDS)
windows = pytest.mark.parametrize(("p", "m"), WINDOWS)


@cache
def data(kind: str, distinct: bool, rows: int = 61) -> tuple[np.ndarray, np.ndarray]:
    """(queries, targets), each (N, 16) float64, not normalised; queries are noisy copies of their targets."""
    rng = np.random.default_rng(rows)
    pool = rows if distinct else rows // 3
    picks = np.arange(rows) if distinct else rng.integers(0, pool, rows)
    if kind == "signs":
        bits = rng.permutation(1 << 16)[:pool, None] >> np.arange(16) & 1  # different numbers: different targets
        targets = (2.0 * bits - 1)[picks]
        return np.where(rng.random(targets.shape) < 0.15, -targets, targets), targets
    centres = rng.normal(size=(6, 16))
    points = centres[rng.integers(0, 6, pool)] + 0.7 * rng.normal(size=(pool, 16))
    return points[picks] + 0.6 * rng.normal(size=(rows, 16)), points[picks]


@dataclass
class Plain:
    """Dense reference; N rows, U distinct targets.

    number (N,) distinct target of each row; score (N, N) of query i with row j's target; rank (N, U);
    hit, top (N, N): row j's target is in the window / above it for query i, and not i's own.
    """

    number: np.ndarray
    score: np.ndarray
    order: np.ndarray
    hit: np.ndarray
    top: np.ndarray
    other: np.ndarray


def plain(queries: np.ndarray, targets: np.ndarray, p: int, m: int) -> Plain:
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (queries, targets))
    seen: list[list[float]] = []
    for row in targets.tolist():
        if row not in seen:
            seen.append(row)
    number = np.array([seen.index(row) for row in targets.tolist()])
    first = np.array([np.flatnonzero(number == u)[0] for u in range(len(seen))])
    score = x @ y.T
    if set(np.unique(targets)) == {-1.0, 1.0}:
        assert np.array_equal(score, np.rint(score * 16) / 16), "these scores are exact, so ties are ties"
    else:
        gaps = np.diff(np.sort(score[:, first], axis=1), axis=1)
        assert gaps.min() > 1e-7, "nothing here is near enough to a tie to depend on rounding"
    order = np.argsort(-score[:, first], axis=1, kind="stable")  # stable: ties by number
    rank = np.argsort(order, axis=1)[:, number]
    other = number[:, None] != number[None, :]
    return Plain(number, score, order, other & (rank >= p) & (rank < p + m), other & (rank < p), other)


def weights(found: Plain, edges: str, veto: bool) -> np.ndarray:
    """(N, N) edge weights."""
    if edges == "mutual":
        return (found.hit & found.hit.T).astype(int)
    union = found.hit.astype(int) + found.hit.T
    return union * ~(found.top | found.top.T) if veto else union


def ranked(
    queries: np.ndarray, targets: np.ndarray, p: int, m: int, terms: int = 7
) -> tuple[Rankings, DistinctTargets]:
    distinct = distinct_targets(unit_rows(targets, "targets"))
    return rank_targets(unit_rows(queries, "queries"), distinct, p, min(m, len(distinct) - p), terms), distinct


def matrix(graph: Graph) -> np.ndarray:
    dense = np.zeros((len(graph), len(graph)), dtype=int)
    for i in range(len(graph)):
        span = slice(graph.indptr[i], graph.indptr[i + 1])
        assert (np.diff(graph.indices[span]) > 0).all(), "ascending, none twice"
        dense[i, graph.indices[span]] = graph.weights[span]
    return dense


@both
@pytest.mark.parametrize("rows", [20, 61])
def test_the_full_ranking_breaks_ties_by_number_of_the_distinct_target(kind: str, distinct: bool, rows: int) -> None:
    queries, targets = data(kind, distinct, rows)
    expected = plain(queries, targets, 0, 1)
    ranks, groups = ranked(queries, targets, 0, rows)
    assert np.array_equal(groups.of_row, expected.number)
    assert np.array_equal(ranks.order, expected.order)
    assert np.allclose(ranks.positive_scores, np.diagonal(expected.score), atol=1e-6)
    if kind == "signs":
        in_order = np.take_along_axis(expected.score, np.argsort(-expected.score, axis=1), axis=1)
        assert (np.diff(in_order, axis=1) == 0).mean() > 0.3, "there are many ties"


@both
@windows
def test_window_membership(kind: str, distinct: bool, p: int, m: int) -> None:
    queries, targets = data(kind, distinct)
    expected = plain(queries, targets, p, m)
    ranks, _ = ranked(queries, targets, p, m)
    rank = ranks.rank_of(np.arange(len(queries))[:, None], expected.number)
    assert np.array_equal((rank >= p) & expected.other, expected.hit)
    assert np.array_equal((rank >= 0) & (rank < p) & expected.other, expected.top)
    assert not (expected.hit & expected.top).any()


@both
@windows
@pytest.mark.parametrize(("edges", "veto"), [("union", True), ("union", False), ("mutual", True)])
def test_graph(kind: str, distinct: bool, p: int, m: int, edges: str, veto: bool) -> None:
    queries, targets = data(kind, distinct)
    expected = weights(plain(queries, targets, p, m), edges, veto)
    graph = build_graph(*ranked(queries, targets, p, m), edges, veto, budget=10**6, seed=0)
    assert np.array_equal(matrix(graph), expected)
    assert graph.num_edges == np.count_nonzero(expected) // 2
    assert np.array_equal(graph.degrees(), expected.sum(axis=1))
    if edges == "mutual":
        assert set(np.unique(expected)) <= {0, 1}
    elif not veto:
        assert expected.sum() == 2 * plain(queries, targets, p, m).hit.sum(), "the weight counts directed window hits"


@pytest.mark.parametrize("kind", ["signs", "gauss"])
@windows
def test_distinct_targets_give_the_row_semantics_of_the_paper(kind: str, p: int, m: int) -> None:
    """R, S = R[:, p:p+m] and "j in S_i and i in S_j" written as in section 3.2, with no notion of equal targets."""
    queries, targets = data(kind, True)
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (queries, targets))
    ranking = np.argsort(-(x @ y.T), axis=1, kind="stable")
    windows = [set(row.tolist()) for row in ranking[:, p : p + m]]
    skipped = [set(row.tolist()) for row in ranking[:, :p]]
    found, groups = ranked(queries, targets, p, m)
    assert len(groups) == len(groups.of_row) and np.array_equal(found.order, ranking[:, : p + m])
    assert [set(row.tolist()) for row in found.window(slice(None))] == windows
    for edges, veto in (("mutual", True), ("union", False), ("union", True)):
        expected = np.zeros((len(x), len(x)), dtype=int)
        for i in range(len(x)):
            for j in range(len(x)):
                forth, back = j in windows[i], i in windows[j]
                met = (forth and back) if edges == "mutual" else forth + back
                if i != j and not (edges == "union" and veto and (j in skipped[i] or i in skipped[j])):
                    expected[i, j] = met
        graph = build_graph(found, groups, edges, veto, budget=m, seed=0)
        assert np.array_equal(matrix(graph), expected), "and m edges per row are never thinned"


def mined(kind: str, distinct: bool, p: int, m: int, partitioner: str, size: int = 8, h: int = 3) -> BatchPlan:
    return mine(*data(kind, distinct), p=p, m=m, community_size=size, hard_negatives=h, partitioner=partitioner)


@both
@windows
@pytest.mark.parametrize("partitioner", ["anneal", "paper", "kmeans", "random"])
def test_measures_of_a_plan(kind: str, distinct: bool, p: int, m: int, partitioner: str) -> None:
    queries, targets = data(kind, distinct)
    expected = plain(queries, targets, p, m)
    report = (plan := mined(kind, distinct, p, m, partitioner)).report
    hits, tops, copies, masses = [], [], [], []
    first_row = {int(u): int(np.flatnonzero(expected.number == u)[0]) for u in np.unique(expected.number)}
    for members in plan.communities:
        for i in members:
            hits.append(sum(expected.hit[i, j] for j in members))
            tops.append(sum(expected.top[i, j] for j in members))
            copies.append(sum(expected.number[j] == expected.number[i] for j in members if j != i))
            own = expected.number[i]
            there = {expected.number[j] for j in members if expected.other[i, j] and not expected.top[i, j]}
            largest = [u for u in expected.order[i].tolist()[p:] if u != own][: len(members) - 1]
            terms = [
                np.exp([expected.score[i, first_row[int(u)]] / 0.02 for u in part]).sum() for part in (there, largest)
            ]
            masses.append(terms[0] / terms[1])
    assert report["mined_negatives_per_query"] == pytest.approx(np.mean(hits), rel=1e-12)
    assert report["skipped_ranks_per_query"] == pytest.approx(np.mean(tops), rel=1e-12)
    assert report["duplicate_targets_in_community"] == pytest.approx(np.mean(copies), rel=1e-12)
    assert report["teacher_mass_captured"] == pytest.approx(np.mean(masses), rel=1e-5)
    assert min(masses) >= 0 and max(masses) <= 1 + 1e-9
    share = (len(plan.communities[0]) - 1) / (len(queries) - 1)
    for key, matrix in (("mined_negatives", expected.hit), ("skipped_ranks", expected.top)):
        assert report[f"random_{key}_per_query"] == pytest.approx(np.sum(matrix) / len(queries) * share)
    example = report["examples"][1]
    members = plan.communities[example["community"]]
    assert example["rows"] == members.tolist()
    assert example["mined_negatives"] == [sum(expected.hit[i, j] for j in members) for i in members]
    if distinct:
        assert report["duplicate_targets_in_community"] == 0


@both
@windows
@pytest.mark.parametrize("h", [1, 4, 20])
def test_rules_of_hard_negatives(kind: str, distinct: bool, p: int, m: int, h: int) -> None:
    expected = plain(*data(kind, distinct), p, m)
    plan = mined(kind, distinct, p, m, "anneal", h=h)
    drawn = plan.hard_negatives
    assert drawn is not None and drawn.shape == (len(expected.number), h) and drawn.dtype == np.int64
    for members in [*plan.communities, plan.remainder]:
        own = set(expected.number[members].tolist())
        shared = {
            int(u): int(expected.hit[members][:, expected.number == u].any(axis=1).sum())
            - int(expected.top[members][:, expected.number == u].any(axis=1).sum())
            for u in np.unique(expected.number)
            if u not in own
        }
        candidates = {u for u, score in shared.items() if score > 0}
        rows = drawn[members]
        used = rows[rows >= 0]
        given = expected.number[used].tolist()
        assert len(set(given)) == len(given), "distinct within the community"
        assert set(given) <= candidates, "positive score, and no member's own target"
        assert all(row == np.flatnonzero(expected.number == expected.number[row])[0] for row in used.tolist())
        for i, negatives in zip(members, rows, strict=True):
            assert not any(expected.top[i, j] for j in negatives if j >= 0), "never from the owner's top p"
            if (negatives < 0).any():
                left = candidates - set(given)
                banned = set(expected.order[i, :p].tolist())
                assert left <= banned, "a shortfall only where nothing that is allowed is left"
    assert (drawn >= -1).all()
    assert plan.report["hard_negatives_missing"] == int((drawn < 0).sum())


@both
@pytest.mark.parametrize(("edges", "veto"), [("union", True), ("union", False), ("mutual", True)])
def test_refinement_counts_its_gains_right(kind: str, distinct: bool, edges: str, veto: bool) -> None:
    """The objective by a loop over pairs, before and after each number of passes."""
    queries, targets = (a[:60] for a in data(kind, distinct))
    expected = plain(queries, targets, 3, 10)
    dense = weights(expected, edges, veto)

    def value(labels: np.ndarray) -> int:
        pairs = [(i, j) for i in range(60) for j in range(i) if labels[i] == labels[j]]
        return sum(int(dense[i, j]) - DUPLICATE_COST * int(not expected.other[i, j]) for i, j in pairs)

    graph = build_graph(*ranked(queries, targets, 3, 10), edges, veto, budget=10**6, seed=0)
    start = random_groups(60, 6, 0)
    assert objective(graph, start, expected.number) == value(start)
    for passes in range(4):
        labels, gains = refine(graph, start, expected.number, 6, passes, seed=5)
        assert value(labels) == value(start) + sum(gains)
        assert all(gain >= 0 for gain in gains) and (np.bincount(labels) == 6).all()


@pytest.mark.parametrize("kind", ["signs", "gauss"])
def test_no_single_swap_improves_a_refined_plan(kind: str) -> None:
    """All pairs of rows tried on a plan of distinct targets: refinement that stopped by itself left nothing."""
    queries, targets = (a[:60] for a in data(kind, True))
    dense = weights(plain(queries, targets, 3, 10), "union", True)
    plan = mine(queries, targets, p=3, m=10, community_size=6, hard_negatives=0, refine_passes=50)
    assert plan.report["refinement_gains"][-1:] in ([], [0])
    labels = np.empty(60, dtype=int)
    labels[plan.communities] = np.arange(10)[:, None]
    towards = dense @ np.eye(10, dtype=int)[labels]
    for i in range(60):
        for j in range(i):
            a, b = labels[i], labels[j]
            gain = towards[i, b] + towards[j, a] - towards[i, a] - towards[j, b] - 2 * dense[i, j]
            assert a == b or gain <= 0


@both
@pytest.mark.parametrize(("partitioner", "edges"), [("anneal", "union"), ("anneal", "mutual"), ("paper", "mutual")])
def test_the_rows_left_out_are_the_least_connected(kind: str, distinct: bool, partitioner: str, edges: str) -> None:
    queries, targets = data(kind, distinct)
    degrees = weights(plain(queries, targets, 3, 10), edges, True).sum(axis=1)
    plan = mine(queries, targets, p=3, m=10, community_size=8, hard_negatives=0, partitioner=partitioner, edges=edges)
    assert plan.remainder.size == 5
    assert np.array_equal(np.sort(degrees[plan.remainder]), np.sort(degrees)[:5])
