"""Classification as preset paper mines it, against the rule written out over all pairs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
from mining import reference

from b3.config import load_config
from b3.errors import InputError
from b3.mining import mine
from b3.mining.graph import merge_facts
from b3.mining.miners import paper
from b3.mining.miners.paper import label_graph, restrict_targets, split_rows
from b3.mining.rankings import label_count, rank_labels
from b3.mining.recipe import mine_recipe
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows

ROWS, LABELS, K = 200, 13, 8


def prepared(rows: int = ROWS, labels: int = LABELS) -> tuple[np.ndarray, np.ndarray, np.ndarray, DistinctTargets]:
    queries, targets = reference.clustered(rows, labels=labels)
    return queries, targets, unit_rows(queries, "queries"), distinct_targets(unit_rows(targets, "targets"))


@pytest.mark.parametrize("labels", [1, 2, 3, 10, 20, 24, 397, 1000])
def test_thirty_percent_of_the_labels(labels: int) -> None:
    assert label_count(labels) == math.ceil(labels * 30 / 100)


def test_the_graph_joins_rows_that_are_near_each_others_label() -> None:
    queries, targets, units, distinct = prepared()
    width = label_count(len(distinct))
    ranks = rank_labels(units, distinct, width, K - 1)
    number, orders = reference.distinct_of(targets), reference.ranking(queries, targets)
    near = [set([v for v in order if v != number[i]][:width]) for i, order in enumerate(orders)]
    assert [set(row) for row in ranks.order.tolist()] == near
    expected = np.array([[number[j] in near[i] and number[i] in near[j] for j in range(ROWS)] for i in range(ROWS)])
    graph = label_graph(ranks, distinct)
    assert np.array_equal(reference.dense(graph), expected.astype(int))
    assert expected.any() and not expected[number[:, None] == number].any(), "rows of one label are never joined"


PAPER = {"preset": "paper", "classification": True}


def test_communities_stay_in_their_subset_and_leftovers_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "SUBSET_ROWS", 60)
    queries, targets, _, _ = prepared()
    plan = mine(queries, targets, 1, 4, K, 0, seed=3, **PAPER)
    pieces = split_rows(ROWS, 60, 3)
    assert [len(p) for p in pieces] == [60, 60, 60, 20]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(ROWS))
    piece_of = np.empty(ROWS, dtype=int)
    for n, piece in enumerate(pieces):
        piece_of[piece] = n
    assert (piece_of[plan.communities] == piece_of[plan.communities[:, :1]]).all()
    assert plan.communities.shape == (7 * 3 + 2, K)
    assert len(plan.remainder) == 3 * 4 + 4 > K
    assert sorted([*plan.communities.ravel(), *plan.remainder]) == list(range(ROWS))


def test_mining_by_label_puts_neighbouring_labels_together() -> None:
    queries, targets, _, _ = prepared()
    plan = mine(queries, targets, community_size=K, hard_negatives=0, **PAPER)
    assert [plan.manifest[key] for key in ("p", "m", "edges", "partitioner")] == [0, 4, "mutual", "paper"]
    report = plan.report
    assert report["mined_negatives_per_query"] > 1.5 * report["random_mined_negatives_per_query"]


def test_class_negatives_are_the_first_labels_of_the_members() -> None:
    queries, targets, _, _ = prepared(labels=150)
    number = reference.distinct_of(targets)
    orders = reference.ranking(queries, targets)
    plan = mine(queries, targets, community_size=K, hard_negatives=2, **PAPER)
    assert plan.hard_negatives is not None and (plan.hard_negatives >= 0).all()
    for members in plan.communities:
        near = {u for i in members for u in [v for v in orders[i] if v != number[i]][:100]}
        assert set(number[plan.hard_negatives[members].ravel()].tolist()) <= near


def test_two_labels_are_a_complete_graph_between_them() -> None:
    _, _, units, distinct = prepared(60, 2)
    graph = label_graph(rank_labels(units, distinct, label_count(2), K - 1), distinct)
    assert graph.num_edges == int(np.prod(distinct.counts))


def test_targets_of_a_subset_keep_their_order() -> None:
    distinct = prepared()[3]
    rows = np.arange(0, ROWS, 9)
    part = restrict_targets(distinct, rows)
    assert np.array_equal(part.vectors[part.of_row], distinct.vectors[distinct.of_row[rows]])
    assert np.array_equal(np.sort(part.rows), np.arange(len(rows))) and part.starts[-1] == len(rows)
    for u in range(len(part)):
        assert (part.of_row[part.rows[part.starts[u] : part.starts[u + 1]]] == u).all()


def test_facts_of_subsets_are_merged() -> None:
    first = {"edges": 3, "size_min": 2, "size_max": 9, "gains": [5, 1]}
    parts = [first, {"edges": 4, "size_min": 1, "size_max": 7, "gains": [2]}]
    assert merge_facts(parts) == {"edges": 7, "size_min": 1, "size_max": 9, "gains": [7, 1]}


def test_too_many_edges_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, units, distinct = prepared()
    monkeypatch.setattr(paper, "MAX_EDGES", 1000)
    with pytest.raises(InputError, match="above the limit of 1,000; mine without preset paper"):
        label_graph(rank_labels(units, distinct, 4, K - 1), distinct)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_data(tmp_path / "data")
    datasets = [{"subset": "pictures"}, {"subset": "words", "family": "classification"}]
    tiny.write_recipe(tmp_path, data={"datasets": datasets})
    (tmp_path / "teacher").mkdir()
    queries, labels = reference.clustered(96, labels=20)
    for subset, targets in (("pictures", reference.clustered(96)[1]), ("words", labels)):
        np.save(tmp_path / "teacher" / f"{subset}_queries.npy", queries)
        np.save(tmp_path / "teacher" / f"{subset}_targets.npy", targets)
    return tmp_path


def test_a_recipe_mines_classification_its_own_way(root: Path) -> None:
    plans = mine_recipe(load_config(root / "recipe.yaml", ["mining.preset=paper"]))
    keys = ("preset", "classification", "m", "partitioner", "edges")
    facts = {name: [plan.manifest[key] for key in keys] for name, plan in plans.items()}
    assert facts == {
        "pictures": ["paper", False, 10, "paper", "mutual"],
        "words": ["paper", True, 6, "paper", "mutual"],
    }
    again = mine_recipe(load_config(root / "recipe.yaml", ["mining.preset=paper"]))["words"]
    assert plans["words"].manifest.items() <= again.manifest.items()
    with pytest.raises(InputError, match="preset was 'paper', now None"):
        mine_recipe(load_config(root / "recipe.yaml"))


@pytest.mark.parametrize("override", ["mining.partitioner=kmeans", "mining.edges=union"])
def test_what_contradicts_the_preset_is_refused(root: Path, override: str) -> None:
    with pytest.raises(InputError, match="contradicts preset paper"):
        load_config(root / "recipe.yaml", ["mining.preset=paper", override])
