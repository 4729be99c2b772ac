"""Normalisation, the exact grid, identical targets."""

from __future__ import annotations

import numpy as np
import pytest

from b3.errors import InputError
from b3.mining.rankings import pair_scores
from b3.mining.vectors import GRID, distinct_targets, embeddings_fingerprint, mix64, seeded_order, uniform, unit_rows


def test_unit_rows_are_unit_float32_on_the_grid() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 1000))
    units = unit_rows(rows, "queries")
    assert units.dtype == np.float32 and units.flags.c_contiguous
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(units, expected, rtol=1e-6, atol=2.0**-26)
    scaled = units.astype(np.float64) * GRID
    assert np.array_equal(scaled, np.rint(scaled))


def test_scores_are_exact_in_any_order_of_summation() -> None:
    a, b = (unit_rows(np.random.default_rng(s).normal(size=(20, 1536)), "queries") for s in (0, 1))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    scores = pair_scores(a, b[:, None])[:, 0]
    order = np.random.default_rng(2).permutation(1536)
    assert np.array_equal(scores, np.einsum("nd,nd->n", wide_a[:, order], wide_b[:, order]))
    assert np.array_equal(scores, np.diag(wide_a @ wide_b.T))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_memory_order_and_scale_do_not_matter(dtype: type) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(dtype)
    units = unit_rows(rows, "queries")
    assert np.array_equal(units, unit_rows(np.asfortranarray(rows), "queries"))
    assert np.array_equal(units, unit_rows(np.repeat(rows, 2, axis=0)[::2], "queries"))
    assert np.array_equal(units, unit_rows(rows * dtype(4), "queries"))
    assert embeddings_fingerprint(rows) == embeddings_fingerprint(np.asfortranarray(rows))
    assert embeddings_fingerprint(rows) != embeddings_fingerprint(rows[::-1])


def test_extreme_magnitudes_are_normalised() -> None:
    rows = np.array([[3e300, 4e300], [3e-300, 4e-300]])
    np.testing.assert_allclose(unit_rows(rows, "queries"), [[0.6, 0.8]] * 2, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "row 9 of the targets has NaN"), (np.inf, "row 9 of"), (0.0, "is a zero vector")]
)
def test_a_bad_row_is_named(value: float, message: str) -> None:
    rows = np.ones((20, 3))
    rows[9] = value
    rows[12] = value
    with pytest.raises(InputError, match=message):
        unit_rows(rows, "targets")


def test_a_bad_row_in_a_later_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("b3.mining.vectors.BLOCK_ROWS", 8)
    rows = np.ones((20, 3))
    rows[17, 1] = -np.inf
    with pytest.raises(InputError, match="row 17 of the queries"):
        unit_rows(rows, "queries")


def test_identical_rows_are_one_target_numbered_by_first_occurrence() -> None:
    rng = np.random.default_rng(0)
    pool = unit_rows(rng.normal(size=(7, 5)), "targets")
    rows = pool[[3, 1, 3, 0, 1, 6, 3]]
    distinct = distinct_targets(rows)
    assert distinct.of_row.tolist() == [0, 1, 0, 2, 1, 3, 0]
    assert np.array_equal(distinct.vectors, pool[[3, 1, 0, 6]])
    assert distinct.counts.tolist() == [3, 2, 1, 1]
    assert [distinct.rows[a:b].tolist() for a, b in zip(distinct.starts, distinct.starts[1:], strict=False)] == [
        [0, 2, 6],
        [1, 4],
        [3],
        [5],
    ]
    assert np.array_equal(distinct_targets(pool).of_row, np.arange(7))


def test_zero_and_minus_zero_are_the_same_target() -> None:
    rows = unit_rows(np.array([[1.0, 0.0], [1.0, -0.0], [1.0, -1e-12]]), "targets")
    assert len(distinct_targets(rows)) == 1


def test_hashes_are_stable_and_uniform() -> None:
    assert mix64(0, np.arange(2)).tolist() == mix64(0, np.arange(5))[:2].tolist()
    assert mix64(0, 1)[0] != mix64(1, 0)[0]
    values = uniform(mix64(3, np.arange(20_000)))
    assert values.min() > 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01
    assert sorted(seeded_order(5, 100)) == list(range(100))
