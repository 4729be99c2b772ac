"""Hard negatives: scores, exclusions, prefixes, shortfall."""

from __future__ import annotations

import numpy as np
import pytest
from mining import reference

from b3.mining.negatives import draw_negatives
from b3.mining.rankings import rank_targets
from b3.mining.vectors import distinct_targets, unit_rows

P, M, K = 3, 15, 8


def drawn(labels: int | None, per_query: int, rows: int = 90, seed: int = 0) -> tuple[np.ndarray, ...]:
    queries, targets = reference.clustered(rows, labels=labels)
    distinct = distinct_targets(unit_rows(targets, "targets"))
    ranks = rank_targets(unit_rows(queries, "queries"), distinct, P, M, K - 1)
    order = np.random.default_rng(1).permutation(rows)
    communities, remainder = order[: rows // K * K].reshape(-1, K), order[rows // K * K :]
    return draw_negatives(ranks, distinct, communities, remainder, per_query, seed), communities, remainder, ranks


@pytest.mark.parametrize(("labels", "per_query"), [(None, 4), (None, 40), (45, 4), (20, 5)])
def test_every_drawn_negative_is_allowed(labels: int | None, per_query: int) -> None:
    negatives, communities, remainder, ranks = drawn(labels, per_query)
    assert negatives.shape == (90, per_query) and negatives.dtype == np.int64
    own, order = ranks.target_ids, ranks.order
    for members in [*communities, remainder]:
        given = negatives[members]
        targets = own[given[given >= 0]]
        assert len(set(targets.tolist())) == len(targets), "a target is drawn once per community"
        assert not set(targets.tolist()) & set(own[members].tolist())
        score = np.zeros(own.max() + 1, dtype=int)
        for i in members:
            score[order[i, P : P + M]] += 1
            score[order[i, :P]] -= 1
        assert (score[targets] > 0).all()
        for i in members:
            mine = negatives[i][negatives[i] >= 0]
            assert not set(own[mine].tolist()) & set(order[i, :P].tolist())


def test_a_shortfall_is_marked_and_only_where_nothing_is_left() -> None:
    negatives, communities, _, ranks = drawn(None, 40)
    assert (negatives == -1).any()
    for members in communities:
        score = np.zeros(90, dtype=int)
        for i in members:
            score[ranks.order[i, P : P + M]] += 1
            score[ranks.order[i, :P]] -= 1
        score[members] = 0
        unused = set(np.flatnonzero(score > 0)) - set(negatives[members].ravel())
        for i in members:
            if (negatives[i] == -1).any():
                assert unused <= set(ranks.order[i, :P])


def test_fewer_negatives_are_a_prefix_of_more() -> None:
    assert np.array_equal(drawn(None, 6)[0][:, :2], drawn(None, 2)[0])


def test_the_seed_decides() -> None:
    assert np.array_equal(drawn(None, 4, seed=1)[0], drawn(None, 4, seed=1)[0])
    assert not np.array_equal(drawn(None, 4, seed=1)[0], drawn(None, 4, seed=2)[0])


def test_probability_grows_with_the_score() -> None:
    _, communities, _, ranks = drawn(None, 1)
    members = communities[0]
    score = np.zeros(90, dtype=int)
    for i in members:
        score[ranks.order[i, P : P + M]] += 1
        score[ranks.order[i, :P]] -= 1
    score[members] = 0
    frequency = np.zeros(90)
    for seed in range(400):
        negatives = drawn_for(members, ranks, seed)
        frequency[negatives] += 1
    assert frequency[score <= 0].sum() == 0
    low, high = frequency[score == 1].mean(), frequency[score >= 3].mean()
    assert high > 2 * low


def drawn_for(members: np.ndarray, ranks: object, seed: int) -> np.ndarray:
    from b3.mining.negatives import _draw

    distinct = distinct_targets(unit_rows(reference.clustered(90)[1], "targets"))
    return _draw(ranks, distinct, members, 1, seed, as_authors=False)[:2, 0]  # type: ignore[arg-type]
