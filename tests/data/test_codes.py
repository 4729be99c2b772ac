"""Vectors in fewer bits against brute force: scores, ties, and what recall says."""

from __future__ import annotations

import numpy as np
import pytest

from b3.data.codes import Codes, Floats, nearest, recall, sign_products, signs


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("top", [1, 7, 40, 1000])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_search_is_exact_also_on_ties(top: int, precision: str) -> None:
    vectors = unit(300, 16)
    vectors[100:160] = vectors[3]
    queries = np.concatenate([vectors[[3, 50]], unit(4, 16, seed=1)])
    stored = Floats(vectors) if precision == "float32" else Codes.of(vectors)
    held = vectors if precision == "float32" else stored.take(slice(None))
    for query, hits in zip(queries.astype(np.float64), nearest(stored, queries, top), strict=True):
        exact = (held * query).sum(axis=1)
        order = sorted(range(300), key=lambda row: (-exact[row], row))[:top]
        assert [row for row, _ in hits] == order
        assert [score for _, score in hits] == pytest.approx(exact[order].tolist(), abs=1e-12)


def test_codes_are_off_by_half_a_step_at_most() -> None:
    vectors = np.concatenate([unit(50, 24), np.zeros((1, 24), dtype=np.float32)])
    codes = Codes.of(vectors)
    assert codes.values.dtype == np.int8 and np.abs(codes.values[:50]).max(axis=1).tolist() == [127] * 50
    error = np.abs(codes.take(slice(None)) - vectors)
    assert (error <= 0.5001 * codes.scales[:, None]).all() and (codes.take([50]) == 0).all()
    query = unit(1, 24, seed=2)[0]
    np.testing.assert_allclose(codes.product(query), codes.take(slice(None)) @ query, atol=1e-6)


@pytest.mark.parametrize("width", [8, 21, 64])
def test_products_with_signs(width: int) -> None:
    vectors, query = unit(40, width), unit(1, width, seed=3)[0]
    expected = np.where(vectors > 0, 1.0, -1.0) @ query
    np.testing.assert_allclose(sign_products(signs(vectors), query), expected, atol=1e-5)


def test_signs_choose_and_codes_score() -> None:
    """With room for all rows the result is that of the codes; with little, rows of the best signs alone are scored."""
    vectors, queries = unit(200, 32), unit(5, 32, seed=4)
    codes, bits = Codes.of(vectors), signs(vectors)
    assert nearest(codes, queries, 10, bits, rescore=20) == nearest(codes, queries, 10)
    for query, hits in zip(queries, nearest(codes, queries, 10, bits, rescore=2), strict=True):
        best = np.argsort(-sign_products(bits, query), kind="stable")[:20]
        assert {row for row, _ in hits} <= set(best.tolist())
        scores = codes.take(best).astype(np.float64) @ query.astype(np.float64)
        assert [s for _, s in hits] == pytest.approx(sorted(scores, reverse=True)[:10], abs=1e-9)


def test_recall_is_the_share_that_is_found() -> None:
    vectors = unit(120, 24)
    whole = vectors @ vectors.T
    np.fill_diagonal(whole, -2)
    true = [set(np.argsort(-row, kind="stable")[:10].tolist()) for row in whole]
    other = Floats(vectors[:, ::-1].copy())  # other vectors: finds other rows
    stored = other.array @ vectors.T
    np.fill_diagonal(stored, -2)
    shares = []
    for row in range(120):
        hits = [i for i, _ in nearest(other, vectors[row : row + 1], 11)[0] if i != row][:11]
        shares.append(len(true[row] & set(hits)) / 10)
    assert recall(vectors, other, None) == {"at": 10, "queries": 120, "value": round(float(np.mean(shares)), 4)}
    assert recall(vectors, Floats(vectors), None)["value"] == 1.0
    assert 0.9 < recall(vectors, Codes.of(vectors), None)["value"] <= 1.0
    assert recall(vectors[:1], Floats(vectors[:1]), None)["value"] is None
