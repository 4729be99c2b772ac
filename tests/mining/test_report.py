"""The numbers and examples of the report against plain loops over all pairs, ties and equal targets included."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from mining import reference

from b3.errors import RunError
from b3.mining import BatchPlan, mine
from b3.mining.rankings import Rankings, rank_targets
from b3.mining.report import likely_false_negatives, quality
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows

ROWS, SIZE, P, M = 90, 8, 3, 12
KINDS = ("distinct", "labels", "ties")
everywhere = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Toy:
    """All there is to know of 90 rows: `score` (N, N) of query i with row j's target, exact; `order` of targets."""

    queries: np.ndarray
    targets: np.ndarray
    units: np.ndarray
    distinct: DistinctTargets
    ranks: Rankings
    number: np.ndarray
    score: np.ndarray
    order: np.ndarray


@cache
def toy(kind: str) -> Toy:
    if kind == "ties":  # corners of a cube: every score is a multiple of 1/16; 60 targets for 90 rows
        rng = np.random.default_rng(5)
        corners = 2.0 * (rng.permutation(1 << 16)[:60, None] >> np.arange(16) & 1) - 1
        targets = corners[np.concatenate([np.arange(60), rng.integers(0, 12, 30)])]
        queries = np.where(rng.random(targets.shape) < 0.3, -targets, targets)
        queries[60:75] = queries[:15]
    else:
        queries, targets = reference.clustered(
            ROWS, noise=0.9 if kind == "distinct" else 1.8, labels=None if kind == "distinct" else 25
        )
    units, right = unit_rows(queries, "queries"), unit_rows(targets, "targets")
    number = reference.distinct_of(targets)
    score = units.astype(np.float64) @ right.astype(np.float64).T  # exact: both are on the grid
    first = np.array([np.flatnonzero(number == u)[0] for u in range(number.max() + 1)])
    order = np.argsort(-score[:, first], axis=1, kind="stable")
    distinct = distinct_targets(right)
    return Toy(queries, targets, units, distinct, rank_targets(units, distinct, P, M, SIZE - 1), number, score, order)


@cache
def mined(kind: str, partitioner: str = "anneal", h: int = 2) -> BatchPlan:
    data = toy(kind)
    return mine(data.queries, data.targets, P, M, SIZE, h, partitioner=partitioner, compare=True)


def counted(data: Toy, communities: np.ndarray) -> dict[str, Any]:
    """Everything about pairs, by loops."""
    above, queries_with, copies, by, masses, best = 0, 0, 0, [], [], {}
    first = {int(u): int(np.flatnonzero(data.number == u)[0]) for u in np.unique(data.number)}
    for members in communities.tolist():
        for i in members:
            others = [j for j in members if data.number[j] != data.number[i]]
            copies += sum(data.number[j] == data.number[i] for j in members) - 1
            beyond = [data.score[i, j] - data.score[i, i] for j in others if data.score[i, j] > data.score[i, i]]
            above, by, queries_with = above + len(beyond), by + beyond, queries_with + bool(beyond)
            if others:
                best[i] = min(others, key=lambda j: (-data.score[i, j], j))
            below = [u for u in data.order[i].tolist()[P:] if u != data.number[i]]
            there = {data.number[j] for j in others} & set(below)
            power = {u: np.exp(data.score[i, first[u]] / 0.02) for u in below}
            masses.append(sum(power[u] for u in there) / sum(power[u] for u in below[: len(members) - 1]))
    size = communities.size
    return {
        "negatives_above_positive_per_query": above / size,
        "queries_with_negatives_above_positive": queries_with / size,
        "negatives_above_positive_by": np.mean(by) if by else 0.0,
        "duplicate_targets_in_community": copies / size,
        "teacher_mass_captured": np.mean(masses),
        "masses": masses,
        "best": best,
    }


@everywhere
@pytest.mark.parametrize("partitioner", ["anneal", "paper", "random"])
def test_counts_of_negatives_above_the_positive_and_mass(kind: str, partitioner: str) -> None:
    plan = mined(kind, partitioner)
    expected = counted(toy(kind), plan.communities)
    masses, best = expected.pop("masses"), expected.pop("best")
    for key, value in expected.items():
        assert plan.report[key] == pytest.approx(value, rel=1e-9), key
    assert expected["negatives_above_positive_per_query"] > 0, "there is something to count"
    assert plan.report["teacher_mass_histogram"]["mined"] == np.histogram(masses, 50, (0, 1))[0].tolist()
    found = quality(toy(kind).units, toy(kind).ranks, toy(kind).distinct, plan.communities)
    assert {i: found["nearest"][i] for i in best} == best, "the best-scored other member, ties by row"
    excess = [toy(kind).score[i, j] - toy(kind).score[i, i] for i, j in best.items()]
    assert found["excess"][list(best)].tolist() == excess
    outside = np.setdiff1d(np.arange(ROWS), list(best))
    assert (found["nearest"][outside] == -1).all() and (found["excess"][outside] == -np.inf).all()


def test_a_tie_with_the_own_target_is_not_above_it() -> None:
    data = toy("ties")
    members = mined("ties").communities
    tied = sum(
        data.score[i, j] == data.score[i, i] and data.number[i] != data.number[j]
        for row in members.tolist()
        for i in row
        for j in row
    )
    assert tied > 10, "there are ties that a count of 'at least' would include"


@everywhere
def test_the_comparison_is_what_mining_by_the_papers_recipe_gives(kind: str) -> None:
    ours, paper = mined(kind).report, mined(kind, "paper").report
    keys = [key for key in ours if key.startswith("paper_")]
    counts = ("mined_negatives", "skipped_ranks", "negatives_above_positive")
    assert {f"paper_{count}_per_query" for count in counts} <= set(keys)
    assert {"paper_teacher_mass_captured", "paper_duplicate_targets_in_community"} <= set(keys)
    for key in keys:
        assert ours[key] == paper[key] == paper[key.removeprefix("paper_")], key
    for name, own in (("histogram", "community"), ("teacher_mass_histogram", "mined")):
        assert ours[name]["paper"] == paper[name]["paper"] == paper[name][own]
    assert ours["random_negatives_above_positive_per_query"] == paper["random_negatives_above_positive_per_query"]


def test_a_random_plan_is_its_own_comparison_but_for_expected_counts() -> None:
    report = mined("labels", "random").report
    for key in ("teacher_mass_captured", "negatives_above_positive_per_query", "negatives_above_positive_by"):
        assert report[f"random_{key}"] == report[key]
    assert report["teacher_mass_histogram"]["random"] == report["teacher_mass_histogram"]["mined"]
    assert report["random_mined_negatives_per_query"] != report["mined_negatives_per_query"]


def test_the_papers_recipe_is_measured_on_request_only() -> None:
    data = toy("distinct")

    def compared(**options: Any) -> bool:
        report = mine(data.queries, data.targets, P, M, SIZE, 0, **options).report
        places = {"paper" in report["histogram"], "paper" in report["teacher_mass_histogram"]}
        assert places == {any(key.startswith("paper_") for key in report)}
        return places.pop()

    assert compared(compare=True) and not compared()
    assert compared(partitioner="paper"), "it is at hand"


def test_a_default_plan_needs_no_metis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)  # as if it were not installed
    data = toy("distinct")
    mine(data.queries, data.targets, P, M, SIZE, 0)
    for options in ({"partitioner": "paper"}, {"compare": True}):
        with pytest.raises(RunError, match=r"needs METIS; pip install 'b3\[paper\]'"):
            mine(data.queries, data.targets, P, M, SIZE, 0, **options)  # type: ignore[arg-type]


@everywhere
@pytest.mark.parametrize("partitioner", ["anneal", "random"])
def test_likely_false_negatives_are_the_largest_differences_without_repeats(kind: str, partitioner: str) -> None:
    data, plan = toy(kind), mined(kind, partitioner)
    best = counted(data, plan.communities)["best"]
    pairs = sorted((data.score[i, i] - data.score[i, j], i, j) for i, j in best.items())
    expected: list[tuple[int, int]] = []
    used: set[int] = set()
    for less, i, j in pairs:
        seen = any((data.units[i] == data.units[row]).all() for row, _ in expected)
        if less < 0 and not seen and not used & {data.number[i], data.number[j]} and len(expected) < 12:
            expected.append((i, j))
            used |= {data.number[i], data.number[j]}
    shown = plan.report["likely_false_negatives"]
    assert [(pair["row"], pair["other_row"]) for pair in shown] == expected and len(expected) > 2
    for pair, (i, j) in zip(shown, expected, strict=True):
        assert pair["positive_score"] == data.score[i, i] and pair["negative_score"] == data.score[i, j]
        ranks = [int(np.flatnonzero(data.order[i] == data.number[row])[0]) for row in (i, j)]
        known = [rank if rank < P + M else None for rank in ranks]
        assert [pair["positive_rank"], pair["negative_rank"]] == known


def test_equal_queries_are_shown_once() -> None:
    data = toy("ties")
    excess, nearest = np.full(ROWS, -np.inf), np.full(ROWS, -1)
    assert (data.units[:15] == data.units[60:75]).all(), "rows 60 to 74 repeat the first queries"
    excess[[0, 60, 7]], nearest[[0, 60, 7]] = [0.5, 0.4, 0.3], [20, 30, 40]
    different = data.number[0] != data.number[60]
    assert different, "else the target would already rule it out"
    assert [pair["row"] for pair in likely_false_negatives(data.units, data.ranks, excess, nearest)] == [0, 7]


def test_communities_of_one_and_of_everybody() -> None:
    data = toy("labels")
    for size in (1, ROWS):
        report = mine(data.queries, data.targets, P, M, size, 0, compare=True).report
        json.dumps(report, allow_nan=False)
        if size == 1:
            assert report["likely_false_negatives"] == []
            assert report["negatives_above_positive_by"] == 0
        else:
            assert report["paper_mined_negatives_per_query"] == report["mined_negatives_per_query"]
