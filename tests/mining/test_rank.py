"""Ranks against exact rational arithmetic; independence of blocks, threads and search path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mining import reference

import b3.mining.rank as rank
from b3.mining.rank import NONE, TOP, WINDOW, Ranks, rank_targets
from b3.mining.vectors import distinct_targets, unit_rows


def ranks_of(queries: np.ndarray, targets: np.ndarray, p: int, m: int, terms: int = 3, **options: int | None) -> Ranks:
    distinct = distinct_targets(unit_rows(targets, "targets"))
    return rank_targets(unit_rows(queries, "queries"), distinct, p, m, terms, **options)  # type: ignore[arg-type]


def equal(a: Ranks, b: Ranks) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("order", "own", "positive", "best", "mass"))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_ranks_equal_exact_arithmetic_with_ties_and_duplicates(rows: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, targets = (rng.integers(-2, 3, size=(rows, dim)).astype(np.float32) for _ in range(2))  # many ties
    for side in (queries, targets):
        side[(side == 0).all(axis=1)] = 1
    number = reference.distinct_of(targets)
    found = ranks_of(queries, targets, 0, number.max() + 1)
    assert found.order.tolist() == reference.ranking(queries, targets)
    assert np.array_equal(found.own, number)


@pytest.mark.parametrize("labels", [None, 40])
def test_both_searches_agree_bit_for_bit(labels: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = reference.clustered(400, labels=labels)
    targets[5] = targets[4] * np.float32(1 + 2e-7)  # nearly equal scores: float32 cannot order them
    whole = ranks_of(queries, targets, 5, 20)
    monkeypatch.setattr(rank, "SMALL", 0)
    assert equal(whole, ranks_of(queries, targets, 5, 20))


def test_rows_that_float32_cannot_decide_are_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(6, 16))
    targets = np.ones((300, 16)) + 1e-7 * rng.normal(size=(300, 16))  # 300 targets within the float32 error
    targets = np.concatenate([targets, queries])
    queries = np.concatenate([np.ones((300, 16)), queries])
    whole = ranks_of(queries, targets, 2, 10)
    calls = []
    original = rank._FilteredSearch._all_scores
    monkeypatch.setattr(rank, "SMALL", 0)
    monkeypatch.setattr(rank._FilteredSearch, "_all_scores", lambda s, q: calls.append(len(q)) or original(s, q))
    assert equal(whole, ranks_of(queries, targets, 2, 10))
    assert sum(calls) >= 300


@pytest.mark.parametrize("small", [0, 6000])
def test_ranks_do_not_depend_on_blocks_or_threads(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "SMALL", small)
    queries, targets = reference.clustered(300, dim=70)
    whole = ranks_of(queries, targets, 5, 30, block_rows=300)
    threads = torch.get_num_threads()
    try:
        for block_rows, count in ((1, 1), (7, 2), (128, 1), (None, 2)):
            torch.set_num_threads(count)
            assert equal(whole, ranks_of(queries, targets, 5, 30, block_rows=block_rows))
    finally:
        torch.set_num_threads(threads)


def test_mass_is_the_sum_of_the_largest_terms_from_rank_p_on() -> None:
    queries, targets = reference.clustered(40, labels=15)
    p, terms = 3, 5
    found = ranks_of(queries, targets, p, 4, terms)
    number = reference.distinct_of(targets)
    a, b = unit_rows(queries, "queries").astype(float), unit_rows(targets, "targets").astype(float)
    for i, order in enumerate(reference.ranking(queries, targets)):
        kept = [u for u in order[p:] if u != number[i]][:terms]
        scores = [a[i] @ b[np.flatnonzero(number == u)[0]] for u in kept]
        assert found.best[i] == scores[0]
        np.testing.assert_allclose(found.mass[i], np.exp((np.array(scores) - scores[0]) / 0.02).sum(), rtol=1e-12)
        assert found.positive[i] == a[i] @ b[i]


def test_classify_tells_top_from_window_from_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "CLASSIFY_ROWS", 16)
    queries, targets = reference.clustered(50)
    found = ranks_of(queries, targets, 4, 9)
    rows, columns = np.divmod(np.arange(2500), 50)
    kinds = found.classify(rows, columns).reshape(50, 50)
    for i, order in enumerate(reference.ranking(queries, targets)):
        assert set(np.flatnonzero(kinds[i] == TOP)) == set(order[:4])
        assert set(np.flatnonzero(kinds[i] == WINDOW)) == set(order[4:13])
        assert (kinds[i] == NONE).sum() == 37
