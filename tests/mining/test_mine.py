"""`mine` as a whole: decided edge cases and bad parameters. Invariants are in test_properties.py, bad arrays in
test_bad_input.py, numbers against plain loops in test_brute_force.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from mining import reference

from b3.errors import InputError
from b3.mining import BatchPlan, mine


def check(plan: BatchPlan, rows: int, size: int) -> None:
    assert plan.communities.shape == (rows // size, size) and plan.communities.dtype == np.int64
    assert plan.remainder.shape == (rows % size,) and plan.remainder.dtype == np.int64
    used = np.concatenate([plan.communities.ravel(), plan.remainder])
    assert np.array_equal(np.sort(used), np.arange(rows))
    json.dumps([plan.report, plan.manifest], allow_nan=False)


def test_the_expectation_for_random_communities_is_what_they_have() -> None:
    queries, targets = reference.clustered(2000, clusters=20)
    report = mine(queries, targets, community_size=20, partitioner="random").report
    assert report["mined_negatives_per_query"] == pytest.approx(report["random_mined_negatives_per_query"], rel=0.1)


def test_labels_are_kept_apart_and_still_give_hard_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = reference.clustered(1200, labels=60)
    report = mine(queries, targets, p=3, m=15, community_size=8).report
    assert report["num_distinct_targets"] == len(np.unique(reference.distinct_of(targets)))
    assert report["mined_negatives_per_query"] > 1.5 * report["random_mined_negatives_per_query"]
    monkeypatch.setattr("b3.mining.miners.anneal.DUPLICATE_COST", 0)
    careless = mine(queries, targets, p=3, m=15, community_size=8).report
    assert report["duplicate_targets_in_community"] < 0.6 * careless["duplicate_targets_in_community"]


def test_progress_names_the_stages() -> None:
    seen: list[tuple[str, int, int]] = []
    queries, targets = reference.clustered(60)
    mine(queries, targets, p=2, m=10, community_size=4, progress=lambda *a: seen.append(a))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["normalise", "rank", "graph", "partition", "refine", "negatives", "report"]
    assert all(0 <= done <= total for _, done, total in seen)
    assert ("rank", 60, 60) in seen


@pytest.mark.parametrize(("rows", "size"), [(40, 1), (40, 40), (41, 40), (2, 2), (2, 1), (5, 2)])
@pytest.mark.parametrize("partitioner", ["anneal", "paper", "kmeans", "random"])
def test_extreme_sizes(rows: int, size: int, partitioner: str) -> None:
    queries, targets = reference.clustered(rows)
    plan = mine(queries, targets, p=0, m=5, community_size=size, hard_negatives=1, partitioner=partitioner)
    check(plan, rows, size)
    assert plan.report["size_min"] == plan.report["size_max"] == size


def test_a_graph_without_edges_still_gives_a_plan() -> None:
    rng = np.random.default_rng(0)
    labels = np.eye(2)[np.arange(40) % 2]
    # p = 0 and a window of 1: every query's window is its own target, so no row has an edge
    plan = mine(labels + 0.01 * rng.random((40, 2)), labels, p=0, m=1, community_size=7, hard_negatives=2)
    check(plan, 40, 7)
    assert plan.report["edges"] == 0 and plan.report["isolated_rows"] == 40
    assert plan.report["mined_negatives_per_query"] == 0
    assert (plan.hard_negatives == -1).all() and plan.report["hard_negatives_missing"] == 80


def test_separate_components() -> None:
    blocks = [reference.clustered(24, dim=6, seed=s) for s in range(4)]
    queries, targets = (
        np.concatenate([np.pad(b[side], ((0, 0), (6 * i, 18 - 6 * i))) for i, b in enumerate(blocks)])
        for side in range(2)
    )
    plan = mine(queries, targets, p=1, m=8, community_size=12, hard_negatives=0)
    assert plan.hard_negatives is None
    assert (np.ptp(plan.communities // 24, axis=1) == 0).mean() >= 0.75  # communities follow the components


def test_a_window_beyond_the_last_rank_is_clipped_and_reported() -> None:
    queries, targets = reference.clustered(50)
    plan = mine(queries, targets, p=10, m=1000, community_size=5)
    assert plan.report["window"] == [10, 50] and plan.manifest["m"] == 1000


def test_two_targets_only() -> None:
    labels = np.eye(2)[np.random.default_rng(0).integers(0, 2, 60)]
    queries = labels + np.random.default_rng(1).normal(size=(60, 2))
    plan = mine(queries, labels, p=0, m=100, community_size=6)
    check(plan, 60, 6)
    mixed = labels[plan.communities].argmax(axis=2).mean(axis=1)
    assert (mixed > 0).all() and (mixed < 1).all(), "both labels meet in every community"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"community_size": 51}, "community_size 51 exceeds the 50 rows; give at most 50"),
        ({"community_size": 0}, "community_size is 0: input should be greater than or equal to 1"),
        ({"community_size": 2.0}, "community_size is 2.0"),
        ({"p": -1}, "p is -1: input should be greater than or equal to 0"),
        ({"p": 49}, "p 49 leaves no ranks: there are 50 distinct targets; give at most 48"),
        ({"m": 0}, "m is 0"),
        ({"hard_negatives": -1}, "hard_negatives is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"refine_passes": -1}, "refine_passes is -1"),
        ({"edges": "both"}, "edges is 'both': input should be 'union' or 'mutual'"),
        ({"partitioner": "spectral"}, "no miner 'spectral'; choose from anneal, kmeans, paper, random"),
        ({"partitioner": "paper", "edges": "union"}, "partitioner paper works on mutual edges"),
    ],
)
def test_bad_parameters(change: dict[str, Any], message: str) -> None:
    queries, targets = reference.clustered(50)
    with pytest.raises(InputError, match=message) as caught:
        mine(queries, targets, **{"p": 2, "m": 10, "community_size": 5, **change})
    assert "\n" not in str(caught.value)


GOOD = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("queries", "targets", "message"),
    [
        (GOOD, np.ones((50, 4)), "all rows have the same target"),
        (GOOD[:1], GOOD[:1], "all rows have the same target"),
    ],
)
def test_one_target_leaves_no_negatives(queries: np.ndarray, targets: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mine(queries, targets, p=2, m=10, community_size=min(5, max(1, len(queries))))
