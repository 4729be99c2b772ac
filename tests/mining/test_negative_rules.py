"""Rules of the draw: the authors' code written out once more, limits by score, repetition, and draws by batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining import reference

from b3.errors import InputError, RunError
from b3.mining import BatchPlan, mine
from b3.mining.batch_negatives import BatchDraw, draw_batch
from b3.mining.negatives import FAITHFUL, NegativeRules, _draw, draw_negatives
from b3.mining.rankings import Ranks, rank_targets
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows

P, M, K, ROWS = 3, 15, 8, 96


def prepared(labels: int | None = None, window: int = M) -> tuple[Ranks, DistinctTargets, np.ndarray, np.ndarray]:
    queries, targets = reference.clustered(ROWS, labels=labels)
    distinct = distinct_targets(unit_rows(targets, "targets"))
    units = unit_rows(queries, "queries")
    communities = np.random.default_rng(1).permutation(ROWS).reshape(-1, K)
    return rank_targets(units, distinct, P, min(window, len(distinct) - P), K - 1), distinct, communities, units


def authors_scores(orders: list[list[int]], members: np.ndarray, width: int) -> dict[int, int]:
    """Section by section as their script reads: +1 in [0, p + width), -2 in [0, p), members 0, positive ones kept."""
    score: Counter[int] = Counter()
    for i in members.tolist():
        for j in orders[i][: P + width]:
            score[j] += 1
        for j in orders[i][:P]:
            score[j] -= 2
    for i in members.tolist():
        score[i] = 0
    return {j: s for j, s in score.items() if s > 0}


def sequential_draw(scores: dict[int, int], count: int, rng: np.random.Generator) -> set[int]:
    left = dict(scores)
    for _ in range(min(count, len(scores))):
        rows, weights = list(left), np.array(list(left.values()), dtype=float)
        left.pop(rows[rng.choice(len(rows), p=weights / weights.sum())])
    return set(scores) - set(left)


def test_the_faithful_preset_has_the_candidates_and_frequencies_of_the_authors_code() -> None:
    ranks, distinct, communities, _ = prepared(window=20)
    orders = reference.ranking(*reference.clustered(ROWS))
    expected = authors_scores(orders, communities[0], 20)
    rng, rounds, h = np.random.default_rng(0), 1500, 2
    theirs, ours = np.zeros(ROWS), np.zeros(ROWS)
    for seed in range(rounds):
        given = _draw(ranks, distinct, communities[0], h, seed, FAITHFUL)
        assert (given >= 0).all() and len(np.unique(given)) == K * h
        ours[given.ravel()] += 1
        theirs[list(sequential_draw(expected, K * h, rng))] += 1
    assert set(np.flatnonzero(ours)) <= set(expected)
    # Both are means of `rounds` draws: five standard deviations of their difference.
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(2 * 0.25 * rounds)
    drawn_all = _draw(ranks, distinct, communities[0], 100, 0, NegativeRules(filter="none", drop_member_labels=False))
    assert set(drawn_all[drawn_all >= 0].tolist()) == set(expected)


def test_short_candidates_are_repeated_as_often_as_needed() -> None:
    ranks, distinct, communities, _ = prepared(window=20)
    expected = authors_scores(reference.ranking(*reference.clustered(ROWS)), communities[0], 20)
    h = 25
    given = Counter(_draw(ranks, distinct, communities[0], h, 0, FAITHFUL).ravel().tolist())
    copies = -(-K * h // len(expected))
    assert copies > 1 and sum(given.values()) == K * h and set(given) <= set(expected)
    assert max(given.values()) <= copies
    owned = _draw(ranks, distinct, communities[0], h, 0, NegativeRules(repeat=True))
    for row, member in zip(owned, communities[0], strict=True):
        mine = row[row >= 0]
        assert len(set(mine.tolist())) == len(mine), "with the filter nobody owns a target twice"
        assert not set(mine.tolist()) & {member, *ranks.order[member, :P].tolist()}


@pytest.mark.parametrize("penalty", [0.0, 0.5, 2.0])
def test_the_penalty_decides_what_is_a_candidate(penalty: float) -> None:
    ranks, distinct, communities, _ = prepared()
    rules = NegativeRules(penalty=penalty, filter="none")
    for members in communities:
        score = np.zeros(ROWS)
        for i in members:
            score[ranks.order[i, P:]] += 1
            score[ranks.order[i, :P]] -= penalty
        score[members] = 0
        given = _draw(ranks, distinct, members, 100, 0, rules)
        assert set(given[given >= 0].tolist()) == set(np.flatnonzero(score > 0).tolist())


def test_labels_of_members_are_drawn_only_where_they_are_allowed() -> None:
    ranks, distinct, communities, _ = prepared(labels=12)
    seen = {True: 0, False: 0}
    for drop in seen:
        for members in communities:
            for filter_ in ("all", "none"):
                given = _draw(ranks, distinct, members, 5, 0, NegativeRules(drop_member_labels=drop, filter=filter_))
                seen[drop] += int(np.isin(given[given >= 0], ranks.own[members]).sum())
                if filter_ == "all":
                    assert not (given == ranks.own[members][:, None]).any(), "never the own label"
    assert seen[True] == 0 and seen[False] > 0


LIMITS = [{"max_relative": 0.4}, {"max_margin": 0.7}, {"max_relative": 0.5, "max_margin": 0.7}]


@pytest.mark.parametrize("rules", LIMITS)
def test_limits_by_score_hold_exactly_and_refuse_nothing_else(rules: dict[str, float]) -> None:
    ranks, distinct, communities, units = prepared()
    given = draw_negatives(
        ranks, distinct, communities, np.empty(0, int), 60, 0, NegativeRules(filter="none", **rules), units
    )
    free = draw_negatives(ranks, distinct, communities, np.empty(0, int), 60, 0, NegativeRules(filter="none"))
    assert (given == -1).sum() > (free == -1).sum()
    scores = units.astype(np.float64) @ distinct.vectors.astype(np.float64).T
    for members in communities:
        unused = set(free[members].ravel()) - set(given[members].ravel()) - {-1}
        for i in members:
            most = min(
                ranks.positive[i] - (1 - rules.get("max_relative", 1)) * abs(ranks.positive[i]),
                ranks.positive[i] - rules.get("max_margin", 0),
            )
            assert (scores[i, given[i][given[i] >= 0]] <= most).all()
            assert all(scores[i, j] > most for j in unused), "what nobody got, nobody may have"


def batch_plan(labels: int | None = None, **rules: Any) -> BatchPlan:
    queries, targets = reference.clustered(90, labels=labels)
    return mine(queries, targets, P, M, K, 4, negative_rules=NegativeRules(scope="batch", **rules))


def test_a_batch_draws_from_the_sum_of_its_communities() -> None:
    plan = batch_plan(penalty=0.5)
    assert plan.hard_negatives is None
    queries, targets = reference.clustered(90)
    distinct = distinct_targets(unit_rows(targets, "targets"))
    ranks = rank_targets(unit_rows(queries, "queries"), distinct, P, M, K - 1)
    rows = plan.communities[[4, 1]].ravel()
    score = np.zeros(90)
    for i in rows:
        score[ranks.order[i, P:]] += 1
        score[ranks.order[i, :P]] -= 0.5
    score[rows] = 0
    everything = draw_batch(plan, rows, 40, 0, 0)
    assert set(everything[everything >= 0].tolist()) == set(np.flatnonzero(score > 0).tolist())
    draw, count = BatchDraw(plan), np.zeros(90)
    for step in range(600):
        given = draw(rows, 1, 3, step)
        assert given.shape == (16, 1) and len(np.unique(given)) == 16
        assert not (given == ranks.order[rows, :P]).any()
        count[given.ravel()] += 1
    high, low = count[score >= 3].mean(), count[score == 1].mean()
    assert high > 1.7 * low > 0


def test_a_batch_draw_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    plan = batch_plan()
    plan.save(tmp_path / "plan")
    loaded = BatchPlan.load(tmp_path / "plan")
    rows = plan.communities[:3].ravel()
    assert np.array_equal(draw_batch(plan, rows, 3, 0, 5), draw_batch(loaded, rows, 3, 0, 5))
    assert np.array_equal(draw_batch(plan, rows, 3, 0, 5)[:, :2], draw_batch(plan, rows, 2, 0, 5))
    for other in (draw_batch(plan, rows, 3, 1, 5), draw_batch(plan, rows, 3, 0, 6)):
        assert not np.array_equal(draw_batch(plan, rows, 3, 0, 5), other)


def test_rows_of_no_community_count_like_one() -> None:
    plan = batch_plan()
    assert len(plan.remainder) == 2 and plan.candidates is not None and len(plan.candidates) == 12
    given = draw_batch(plan, plan.remainder, 3, 0, 0)
    assert set(given.ravel().tolist()) <= set(plan.candidates[-1].tolist()) and (given >= 0).all()


def test_equal_targets_are_one_in_a_batch() -> None:
    plan = batch_plan(labels=30)
    assert plan.target_rows is not None
    rows = plan.communities[:2].ravel()
    given = draw_batch(plan, rows, 2, 0, 0)
    targets = plan.target_rows[given[given >= 0]]
    assert len(np.unique(targets)) == len(targets)
    assert not set(targets.tolist()) & set(plan.target_rows[rows].tolist())
    loose = draw_batch(batch_plan(labels=30, drop_member_labels=False, filter="none", repeat=True), rows, 2, 0, 0)
    assert set(plan.target_rows[loose.ravel()].tolist()) & set(plan.target_rows[rows].tolist())


def test_fewer_candidates_are_those_of_largest_score() -> None:
    many, few = batch_plan(), batch_plan(candidates=7)
    assert few.candidates is not None and few.candidates.shape == (12, 7) and few.candidate_scores is not None
    assert many.candidates is not None and many.candidate_scores is not None
    assert np.array_equal(few.candidates, many.candidates[:, :7])
    rest = np.abs(many.candidate_scores[:, 7:]).max(axis=1)
    assert (np.abs(few.candidate_scores).min(axis=1) >= rest).all()


def test_a_plan_without_candidates_cannot_draw() -> None:
    queries, targets = reference.clustered(90)
    with pytest.raises(RunError, match=r"mine it with negatives\.scope batch"):
        draw_batch(mine(queries, targets, P, M, K, 4), np.arange(8), 2, 0, 0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"scope": "rank"}, "scope is 'rank'; choose from community, batch"),
        ({"filter": "some"}, "filter is 'some'"),
        ({"penalty": -1.0}, "penalty is -1.0; give a number of at least 0"),
        ({"penalty": float("nan")}, "penalty is nan"),
        ({"max_relative": 1.5}, "max_relative is 1.5; give a number from 0 to 1"),
        ({"max_margin": -0.1}, "max_margin is -0.1; give a number from 0 to 2"),
        ({"window": 0}, "window is 0; give an integer of at least 1"),
        ({"scope": "batch", "max_margin": 0.05}, "max_margin needs scope community"),
    ],
)
def test_rules_that_cannot_be_used_are_named(rules: dict[str, Any], message: str) -> None:
    queries, targets = reference.clustered(90)
    with pytest.raises(InputError, match=message):
        mine(queries, targets, P, M, K, 4, negative_rules=NegativeRules(**rules))


def test_rules_without_negatives_are_refused() -> None:
    queries, targets = reference.clustered(90)
    with pytest.raises(InputError, match="no effect with hard_negatives 0"):
        mine(queries, targets, P, M, K, 0, negative_rules=FAITHFUL)


def test_the_window_of_negatives_may_be_wider_than_that_of_communities() -> None:
    queries, targets = reference.clustered(90)
    narrow, wide = (
        mine(queries, targets, P, 5, K, 4, negative_rules=NegativeRules(window=w)) for w in (None, 40)
    )  # fmt: skip
    assert np.array_equal(narrow.communities, wide.communities)
    assert {k: v for k, v in narrow.report.items() if k.startswith(("mined", "window", "teacher"))} == {
        k: v for k, v in wide.report.items() if k.startswith(("mined", "window", "teacher"))
    }
    orders = reference.ranking(queries, targets)
    for members, row in zip(wide.communities, wide.hard_negatives[wide.communities], strict=True):
        seen = {j for i in members for j in orders[i][P : P + 5]}
        if set(row.ravel().tolist()) - seen:
            return
    raise AssertionError("no negative from beyond the communities' window")
