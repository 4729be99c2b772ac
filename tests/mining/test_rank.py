"""Ranks against exact rational arithmetic; independence of blocks, threads and search path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mining import reference

import b3.mining.search as search
from b3.mining.rankings import Rankings, join_rankings, rank_targets
from b3.mining.vectors import distinct_targets, unit_rows


def ranks_of(
    queries: np.ndarray, targets: np.ndarray, p: int, m: int, terms: int = 3, **options: int | None
) -> Rankings:
    distinct = distinct_targets(unit_rows(targets, "targets"))
    return rank_targets(unit_rows(queries, "queries"), distinct, p, m, terms, **options)  # type: ignore[arg-type]


def equal(a: Rankings, b: Rankings) -> bool:
    return all(np.array_equal(a.arrays[key], b.arrays[key]) for key in a.arrays)


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
    assert np.array_equal(found.target_ids, number)


SEARCHES = {
    "bfloat16": lambda t, d: search.TileSearch(t, d, "bfloat16"),
    "int8": lambda t, d: search.TileSearch(t, d, "int8"),
    "float32": lambda t, d: search.TileSearch(t, d, "float32"),
    "device": lambda t, d: search.DeviceSearch(t, d, "cpu"),
}


def plain_search(queries: np.ndarray, targets: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ targets.astype(np.float64).T  # exact on the grid
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return ids, np.take_along_axis(scores, ids, axis=1)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize(
    ("rows", "dim", "depth"), [(700, 24, 30), (300, 5, 300), (3000, 70, 7), (9000, 3, 50), (1, 4, 1)]
)
def test_every_search_is_exact(method: str, rows: int, dim: int, depth: int) -> None:
    rng = np.random.default_rng(rows)
    targets = rng.normal(size=(rows, dim)) + 2 * rng.normal(size=dim)
    targets[rows // 2 :: 3] = targets[rows // 3] * 3  # ties
    targets = unit_rows(targets, "targets")
    queries = unit_rows(np.concatenate([rng.normal(size=(40, dim)), -targets[:5], targets[:5]]), "queries")
    ids, scores = SEARCHES[method](targets, depth)(queries)
    wanted, exact = plain_search(queries, targets, depth)
    assert np.array_equal(ids, wanted) and np.array_equal(scores, exact)


@pytest.mark.parametrize("method", SEARCHES)
def test_what_the_rough_pass_cannot_decide_is_computed_in_full(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    targets = unit_rows(np.ones((20_000, 16)) + 1e-7 * rng.normal(size=(20_000, 16)), "targets")
    queries = unit_rows(np.ones((3, 16)) + 1e-3 * rng.normal(size=(3, 16)), "queries")
    counted = []
    original = search.in_full
    monkeypatch.setattr(
        search, "in_full", lambda q, t, rows, i, s: counted.append(len(rows)) or original(q, t, rows, i, s)
    )
    ids, scores = SEARCHES[method](targets, 20)(queries)
    wanted, exact = plain_search(queries, targets, 20)
    assert np.array_equal(ids, wanted) and np.array_equal(scores, exact)
    assert sum(counted) == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 6), st.sampled_from(sorted(SEARCHES)))
@example(0, 3, 1, "int8")
def test_any_search_of_a_grid_of_ties_is_exact(seed: int, rows: int, dim: int, method: str) -> None:
    rng = np.random.default_rng(seed)
    queries, targets = (unit_rows(rng.integers(-1, 2, (n, dim)) + 0.01, "rows") for n in (9, rows))
    depth = int(rng.integers(1, rows + 1))
    ids, _ = SEARCHES[method](targets, depth)(queries)
    assert np.array_equal(ids, plain_search(queries, targets, depth)[0])


def test_the_inverted_file_ranks_what_it_finds_exactly() -> None:
    pytest.importorskip("faiss")
    from b3.mining.search import CellSearch

    queries, targets = (unit_rows(a, "rows") for a in reference.clustered(3000))
    ids, scores = CellSearch(targets, 40)(queries[:200])
    wanted, _ = plain_search(queries[:200], targets, 40)
    recall = np.mean([len(np.intersect1d(a, b)) / 40 for a, b in zip(ids, wanted, strict=True)])
    assert 0.8 < recall <= 1
    exact = (queries[:200].astype(np.float64)[:, None] * targets[ids].astype(np.float64)).sum(axis=2)
    assert np.array_equal(scores, exact) and (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == 40 for row in ids.tolist())


def test_the_inverted_file_moves_to_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """With faiss's calls for a GPU replaced: where the index goes, and that faiss's limits keep it on the CPU."""
    faiss = pytest.importorskip("faiss")
    moved: list[int] = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, gpu, index: moved.append(gpu) or index, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    _, targets = (unit_rows(a, "rows") for a in reference.clustered(3000))
    search.CellSearch(targets, 40)
    assert moved == [3]
    search.CellSearch(targets, 2049)
    assert moved == [3]


def test_parts_of_the_rows_join_to_the_whole() -> None:
    queries, targets = reference.clustered(101, labels=40)
    distinct, units = distinct_targets(unit_rows(targets, "targets")), unit_rows(queries, "queries")
    whole = rank_targets(units, distinct, 3, 9, 4)
    for parts in (1, 2, 3, 7):
        shares = [rank_targets(units, distinct, 3, 9, 4, share=(k, parts)) for k in range(parts)]
        assert equal(whole, join_rankings(shares))


@pytest.mark.parametrize("small", [0, 6000])
def test_ranks_do_not_depend_on_blocks_or_threads(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SMALL", small)
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
        assert found.best_scores[i] == scores[0]
        np.testing.assert_allclose(found.total_mass[i], np.exp((np.array(scores) - scores[0]) / 0.02).sum(), rtol=1e-12)
        assert found.positive_scores[i] == a[i] @ b[i]


@pytest.mark.parametrize("width", [9, 5])
def test_rank_of_finds_targets_down_to_the_end_of_the_window(width: int) -> None:
    queries, targets = reference.clustered(50)
    found = ranks_of(queries, targets, 4, 9).narrow(width)
    everyone = np.arange(50)
    ranks = found.rank_of(everyone[::-1, None], everyone)
    assert ranks.shape == (50, 50)
    for row, order in zip(ranks[::-1], reference.ranking(queries, targets), strict=True):
        assert (
            np.argsort(row[order[: 4 + width]]).tolist() == row[order[: 4 + width]].tolist() == list(range(4 + width))
        )
        assert (row[order[4 + width :]] == -1).all()
