"""Classification by label and in subsets, against the rule written out over all pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mining import reference

from b3.config import load_config
from b3.errors import ConfigError, InputError
from b3.mining import labels as by_label
from b3.mining import mine
from b3.mining.graph import Graph
from b3.mining.labels import label_count, label_graph, merge_facts, rank_labels, restrict_targets, split_rows
from b3.mining.negatives import NegativeRules
from b3.mining.rankings import rank_targets
from b3.mining.recipe import mine_recipe
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows

ROWS, LABELS, K = 200, 13, 8


def prepared(rows: int = ROWS, labels: int = LABELS) -> tuple[np.ndarray, np.ndarray, np.ndarray, DistinctTargets]:
    queries, targets = reference.clustered(rows, labels=labels)
    return queries, targets, unit_rows(queries, "queries"), distinct_targets(unit_rows(targets, "targets"))


def rank(units: np.ndarray, distinct: DistinctTargets, p: int, m: int) -> Any:
    return rank_targets(units, distinct, p, m, K - 1)


@pytest.mark.parametrize("labels", [1, 2, 3, 10, 20, 24, 397, 1000])
def test_thirty_percent_of_the_labels(labels: int) -> None:
    assert label_count(labels) == math.ceil(labels * 30 / 100)


def test_the_graph_joins_rows_that_are_near_each_others_label() -> None:
    queries, targets, units, distinct = prepared()
    width = label_count(len(distinct))
    ranks = rank_labels(units, distinct, width, rank)
    number, orders = reference.distinct_of(targets), reference.ranking(queries, targets)
    near = [set([v for v in order if v != number[i]][:width]) for i, order in enumerate(orders)]
    assert [set(row) for row in ranks.order.tolist()] == near
    expected = np.array([[number[j] in near[i] and number[i] in near[j] for j in range(ROWS)] for i in range(ROWS)])
    graph = label_graph(ranks, distinct)
    assert np.array_equal(reference.dense(graph), expected.astype(int))
    assert expected.any() and not expected[number[:, None] == number].any(), "rows of one label are never joined"


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, units, distinct = prepared()
    ranks = rank_labels(units, distinct, 4, rank)
    whole = label_graph(ranks, distinct)
    monkeypatch.setattr(by_label, "BLOCK_VALUES", 7 * ROWS)
    parts = label_graph(ranks, distinct)
    assert isinstance(parts, Graph)
    assert all(np.array_equal(getattr(whole, n), getattr(parts, n)) for n in ("indptr", "indices", "weights"))


@pytest.mark.parametrize("unit", ["distinct", "label30"])
def test_communities_stay_in_their_subset_and_leftovers_are_pooled(unit: str) -> None:
    queries, targets, _, _ = prepared()
    plan = mine(queries, targets, 1, 4, K, 0, seed=3, target_unit=unit, subset_rows=60)
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
    assert plan.manifest["subset_rows"] == 60 and plan.manifest["target_unit"] == unit
    again = mine(queries, targets, 1, 4, K, 0, seed=3, target_unit=unit, subset_rows=60, block_rows=7)
    assert np.array_equal(plan.communities, again.communities)


def test_mining_by_label_puts_neighbouring_labels_together() -> None:
    queries, targets, _, _ = prepared()
    plan = mine(queries, targets, community_size=K, hard_negatives=0, target_unit="label30", partitioner="paper")
    assert (plan.manifest["p"], plan.manifest["m"], plan.manifest["edges"]) == (0, 4, "mutual")
    report = plan.report
    assert report["mined_negatives_per_query"] > 1.5 * report["random_mined_negatives_per_query"]


def test_class_negatives_are_the_first_labels_of_the_members() -> None:
    queries, targets, _, _ = prepared()
    h, orders, number = 2, reference.ranking(queries, targets), reference.distinct_of(targets)
    for drop in (False, True):
        rules = NegativeRules(filter="none", drop_member_labels=drop, repeat=True)
        plan = mine(
            queries, targets, community_size=K, hard_negatives=h, target_unit="label30", negative_rules=rules
        )  # fmt: skip
        assert plan.hard_negatives is not None
        for members in plan.communities:
            near = {u for i in members for u in [v for v in orders[i] if v != number[i]][: 2 * h]}
            given = plan.hard_negatives[members].ravel()
            drawn = set(number[given[given >= 0]].tolist())
            assert drawn <= (near - set(number[members].tolist()) if drop else near)
            assert drop or (given >= 0).all()


def test_two_labels_are_a_complete_graph_between_them() -> None:
    _, _, units, distinct = prepared(60, 2)
    graph = label_graph(rank_labels(units, distinct, label_count(2), rank), distinct)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_unit": "labels"}, "target_unit is 'labels'; choose from distinct, label30"),
        ({"target_unit": "label30", "edges": "union"}, "label30 works on mutual edges, not union"),
        ({"subset_rows": 7}, "subset_rows is 7; give an integer of at least 8"),
        ({"subset_rows": 50, "p": 10}, "p 10 leaves no ranks in a subset of"),
    ],
)
def test_options_that_cannot_be_used_are_named(options: dict[str, Any], message: str) -> None:
    queries, targets = reference.clustered(60, labels=13)
    with pytest.raises(InputError, match=message):
        mine(queries, targets, **({"p": 1, "m": 4, "community_size": K, "hard_negatives": 0} | options))


def test_too_many_edges_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, units, distinct = prepared()
    monkeypatch.setattr(by_label, "MAX_EDGES", 1000)
    with pytest.raises(InputError, match="above the limit of 1,000; mine in subsets of 10000 rows"):
        label_graph(rank_labels(units, distinct, 4, rank), distinct)


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
    overrides = ["mining.target_unit=label30", "mining.classification_subset=32", "mining.partitioner=paper"]
    overrides += ["mining.edges=mutual"]
    plans = mine_recipe(load_config(root / "recipe.yaml", overrides))
    found = {name: [plan.manifest[k] for k in ("target_unit", "subset_rows", "m")] for name, plan in plans.items()}
    assert found == {"pictures": ["distinct", None, 10], "words": ["label30", 32, 6]}
    again = mine_recipe(load_config(root / "recipe.yaml", overrides))["words"]
    assert plans["words"].manifest.items() <= again.manifest.items()
    with pytest.raises(InputError, match="target_unit is 'label30', the recipe says 'distinct'"):
        mine_recipe(load_config(root / "recipe.yaml", overrides[1:]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mining.target_unit=label30", "data.datasets.1.m=7"], "m 7 of words has no effect .* takes 6 labels"),
        (["mining.target_unit=label30", "data.datasets.1.p=1"], "p 1 of words has no effect"),
        (["mining.target_unit=label30", "data.datasets.1.family=vqa"], "no data set has family classification"),
        (["mining.classification_subset=3"], "classification_subset 3 is smaller than the community size 4"),
    ],
)
def test_keys_without_effect_are_refused(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mine_recipe(load_config(root / "recipe.yaml", overrides))
