"""Partitioners, pieces, balanced k-means; continuing after a finished stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mining import reference

from b3.errors import InputError
from b3.files import Stages
from b3.mining import mine
from b3.mining.miners.kmeans import balanced_kmeans, pair_vectors
from b3.mining.rankings import rank_targets
from b3.mining.vectors import distinct_targets, unit_rows

OPTIONS: dict[str, Any] = {"p": 4, "m": 20, "community_size": 8, "hard_negatives": 0}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
def test_clusters_have_sizes_as_equal_as_units_allow(unit: int, clusters: int, seed: int, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(200)[: unit * clusters * (1 if equal else int(rng.integers(1, 3)))]
    vectors = unit_rows(rng.normal(size=(200, 6)), "rows")
    labels = balanced_kmeans(vectors, rows, clusters, unit, seed)
    sizes = np.bincount(labels, minlength=clusters)
    assert len(sizes) == clusters and (sizes % unit == 0).all()
    assert (sizes == unit).all() if len(rows) == unit * clusters else sizes.max() - sizes.min() <= 2 * unit
    assert np.array_equal(labels, balanced_kmeans(vectors, rows, clusters, unit, seed))


def test_bisection_finds_separate_clusters() -> None:
    rng = np.random.default_rng(1)
    centres = 5 * rng.normal(size=(8, 16))
    truth = rng.permutation(np.repeat(np.arange(8), 20))
    vectors = unit_rows(centres[truth] + 0.1 * rng.normal(size=(160, 16)), "rows")
    labels = balanced_kmeans(vectors, np.arange(160), 8, 20, 0)
    assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 8


def test_a_bisection_is_a_fixed_point_of_balanced_k_means() -> None:
    """For the halves' own means, no exchange of two rows raises the similarity of rows to their centroid."""
    rng = np.random.default_rng(2)
    vectors = unit_rows(rng.normal(size=(60, 4)) + rng.normal(size=4), "rows").astype(np.float64)
    labels = balanced_kmeans(vectors.astype(np.float32), np.arange(60), 2, 30, 0)
    means = [vectors[labels == k].mean(axis=0) for k in range(2)]
    lean = vectors @ (means[0] - means[1])
    assert lean[labels == 0].min() >= lean[labels == 1].max() or lean[labels == 1].min() >= lean[labels == 0].max()


def test_pair_vectors_point_between_query_and_target() -> None:
    queries, targets = reference.clustered(50)
    units, distinct = unit_rows(queries, "queries"), distinct_targets(unit_rows(targets, "targets"))
    found = pair_vectors(units, distinct)
    total = units.astype(np.float64) + distinct.vectors[distinct.of_row]
    np.testing.assert_allclose(found, total / np.linalg.norm(total, axis=1, keepdims=True), atol=2e-8)


def test_annealing_beats_what_a_few_greedy_passes_find() -> None:
    queries, targets = reference.clustered(1500)
    found = {
        name: mine(queries, targets, **OPTIONS, **options).report["mined_negatives_per_query"]
        for name, options in {
            "anneal": {},
            "greedy": {"refine_passes": 3},
            "kmeans": {"partitioner": "kmeans"},
            "random": {"partitioner": "random"},
        }.items()
    }
    assert found["anneal"] > found["greedy"]
    assert found["anneal"] > found["kmeans"] > found["random"]


def test_pieces_keep_sizes_exact_and_cost_some_quality() -> None:
    queries, targets = reference.clustered(1003)
    whole = mine(queries, targets, **OPTIONS)
    plan = mine(queries, targets, **OPTIONS, piece_rows=300)
    assert plan.report["pieces"] == 4 and plan.communities.shape == (125, 8) and len(plan.remainder) == 3
    assert np.array_equal(np.sort(np.concatenate([plan.communities.ravel(), plan.remainder])), np.arange(1003))
    kept = plan.report["mined_negatives_per_query"] / whole.report["mined_negatives_per_query"]
    assert 0.5 < kept <= 1.02
    assert "pieces" not in mine(queries, targets, **OPTIONS, piece_rows=1003).report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"piece_rows": 9}, "piece_rows is 9; give an integer of at least 16"),
        ({"search": "hnsw"}, "search is 'hnsw': input should be 'exact' or 'ivf'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    queries, targets = reference.clustered(100)
    with pytest.raises(InputError, match=message):
        mine(queries, targets, **OPTIONS, **options)


def test_a_finished_ranking_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = reference.clustered(200)
    stages = Stages(tmp_path / "stages")
    whole = mine(queries, targets, **OPTIONS, stages=stages)
    calls: list[int] = []
    module = sys.modules["b3.mining.mine"]  # the package exports a function of that name
    monkeypatch.setattr(module, "rank_targets", lambda *a, **k: calls.append(1) or rank_targets(*a, **k))
    cuts: list[int] = []
    find = module.find_communities
    monkeypatch.setattr(module, "find_communities", lambda *a: cuts.append(1) or find(*a))
    again = mine(queries, targets, **OPTIONS, stages=stages)
    assert not calls and not cuts and np.array_equal(again.communities, whole.communities)
    reports = [{k: v for k, v in p.report.items() if k not in ("seconds", "peak_memory_bytes")} for p in (whole, again)]
    assert reports[0] == reports[1]
    mine(queries, targets, **OPTIONS, refine_passes=5, stages=stages)
    assert not calls and len(cuts) == 1, "other communities of the same ranks"
    for changed in ({"p": 5}, {"m": 21}):
        mine(queries, targets, **OPTIONS | changed, stages=stages)
    mine(queries * 2 + 1, targets, **OPTIONS, stages=stages)
    assert len(calls) == 3
    file = tmp_path / "stages" / "rankings.npz"
    file.write_bytes(file.read_bytes()[:-200])  # torn
    mine(queries * 2 + 1, targets, **OPTIONS, stages=stages)
    assert len(calls) == 4


def test_an_approximate_search_reports_its_recall() -> None:
    pytest.importorskip("faiss")
    queries, targets = reference.clustered(2500)
    report = mine(queries, targets, **OPTIONS, search="ivf").report
    assert 0.7 < report["search_recall"] <= 1 and report["search"] == "ivf"
    assert "search_recall" not in mine(queries, targets, **OPTIONS).report
