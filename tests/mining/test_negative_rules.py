"""The draw of preset paper: the authors' code written out once more."""

from __future__ import annotations

from collections import Counter

import numpy as np
from mining import reference

from b3.mining import mine
from b3.mining.negatives import _draw
from b3.mining.rankings import Rankings, rank_targets
from b3.mining.vectors import DistinctTargets, distinct_targets, unit_rows

P, M, K, ROWS = 3, 15, 8, 96


def prepared(labels: int | None = None, window: int = M) -> tuple[Rankings, DistinctTargets, np.ndarray]:
    queries, targets = reference.clustered(ROWS, labels=labels)
    distinct = distinct_targets(unit_rows(targets, "targets"))
    units = unit_rows(queries, "queries")
    communities = np.random.default_rng(1).permutation(ROWS).reshape(-1, K)
    return rank_targets(units, distinct, P, min(window, len(distinct) - P), K - 1), distinct, communities


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
    ranks, distinct, communities = prepared(window=20)
    orders = reference.ranking(*reference.clustered(ROWS))
    expected = authors_scores(orders, communities[0], 20)
    rng, rounds, h = np.random.default_rng(0), 1500, 2
    theirs, ours = np.zeros(ROWS), np.zeros(ROWS)
    for seed in range(rounds):
        given = _draw(ranks, distinct, communities[0], h, seed, as_authors=True)
        assert (given >= 0).all() and len(np.unique(given)) == K * h
        ours[given.ravel()] += 1
        theirs[list(sequential_draw(expected, K * h, rng))] += 1
    assert set(np.flatnonzero(ours)) <= set(expected)
    # Both are means of `rounds` draws: five standard deviations of their difference.
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(2 * 0.25 * rounds)


def test_short_candidates_are_repeated_as_often_as_needed() -> None:
    ranks, distinct, communities = prepared(window=20)
    expected = authors_scores(reference.ranking(*reference.clustered(ROWS)), communities[0], 20)
    h = 25
    given = Counter(_draw(ranks, distinct, communities[0], h, 0, as_authors=True).ravel().tolist())
    copies = -(-K * h // len(expected))
    assert copies > 1 and sum(given.values()) == K * h and set(given) <= set(expected)
    assert max(given.values()) <= copies


def test_labels_of_members_are_drawn_only_by_the_authors_code() -> None:
    ranks, distinct, communities = prepared(labels=12)
    num_labels = {True: 0, False: 0}
    for as_authors in num_labels:
        for members in communities:
            targets = _draw(ranks, distinct, members, 5, 0, as_authors)
            num_labels[as_authors] += int(np.isin(targets[targets >= 0], ranks.target_ids[members]).sum())
    assert num_labels[False] == 0 and num_labels[True] > 0


def test_the_authors_window_of_negatives_is_100_ranks_whatever_m_is() -> None:
    queries, targets = reference.clustered(200)
    plans = [mine(queries, targets, P, m, K, 4, preset="paper") for m in (5, 100)]
    assert [plan.report["window"] for plan in plans] == [[P, P + 5], [P, P + 100]]
    orders = reference.ranking(queries, targets)
    beyond = 0
    for members, rows in zip(plans[0].communities, plans[0].hard_negatives[plans[0].communities], strict=True):
        shared = {j for i in members for j in orders[i][P : P + 5]}
        beyond += len(set(rows.ravel().tolist()) - shared)
    assert beyond > 0, "negatives from beyond the window of communities"
