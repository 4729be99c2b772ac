"""Vectors as they are searched: float32, 8 bits per number, or the signs alone in front of 8 bits.

    vectors = Codes.of(array)                       # a quarter of the bytes
    hits = nearest(vectors, queries, top=10)        # [(row, score), ...] per query, best first
    hits = nearest(vectors, queries, top=10, bits=signs(array))   # reads 1/32 of the bytes, then 100 rows of 8 bits

Scores are inner products of the float32 query with the vectors as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

# Float32 products round; what lies this close (relative to the vectors' lengths) is compared again in float64.
CLOSE = 1e-5
BLOCK = 1 << 16  # rows that are in float32 at a time
RESCORE = 10
PRECISIONS = ("float32", "int8", "binary")

Hits: TypeAlias = list[tuple[int, float]]


@dataclass(frozen=True)
class Floats:
    """Vectors (N, D) float32, in memory or mapped from a file."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    @property
    def width(self) -> int:
        return int(self.array.shape[1])

    @cached_property
    def longest(self) -> float:
        """An upper bound of the vectors' lengths."""
        return float(np.sqrt(np.einsum("nd,nd->n", self.array, self.array).max()))

    def product(self, query: np.ndarray) -> np.ndarray:
        """(N,) float32 inner products with a query (D,)."""
        product: np.ndarray = self.array @ query
        return product

    def take(self, rows: Any) -> np.ndarray:
        """Some of the vectors, float32."""
        return np.asarray(self.array[rows], dtype=np.float32)


@dataclass(frozen=True)
class Codes:
    """Vectors in 8 bits per number: row i is `scales[i] * values[i]`.

    values: (N, D) int8. scales: (N,) float32, the largest number of each row by 127.
    """

    values: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Codes:
        """The nearest codes of vectors (N, D) float32; an error is at most half a scale per number."""
        scales = np.abs(vectors).max(axis=1) / np.float32(127)
        values = np.rint(vectors / np.maximum(scales, np.finfo(np.float32).tiny)[:, None]).astype(np.int8)
        return cls(values, scales.astype(np.float32))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    @cached_property
    def longest(self) -> float:
        return float(self.scales.max()) * 127 * self.width**0.5

    def product(self, query: np.ndarray) -> np.ndarray:
        parts = [self.values[s : s + BLOCK].astype(np.float32) @ query for s in range(0, len(self), BLOCK)]
        return np.concatenate(parts) * self.scales

    def take(self, rows: Any) -> np.ndarray:
        return self.values[rows].astype(np.float32) * self.scales[rows][:, None]


def signs(vectors: np.ndarray) -> np.ndarray:
    """(N, ceil(D / 8)) uint8: a bit per number, set where it is positive; the first number is the highest bit."""
    return np.packbits(vectors > 0, axis=1)


def sign_products(bits: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(N,) float32: inner products of a query (D,) with +1 and -1 by the bits of `signs`; a table lookup per byte."""
    padded = np.zeros(bits.shape[1] * 8, dtype=np.float32)
    padded[: len(query)] = query
    patterns = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1
    table = patterns @ padded.reshape(-1, 8).T  # (256, bytes)
    columns = np.arange(bits.shape[1])
    blocks = (bits[s : s + BLOCK] for s in range(0, len(bits), BLOCK))
    return np.concatenate([table[block, columns].sum(axis=1) for block in blocks])


def nearest(
    vectors: Floats | Codes,
    queries: np.ndarray,
    top: int,
    bits: np.ndarray | None = None,
    rescore: int = RESCORE,
) -> list[Hits]:
    """The `top` rows per query with the largest inner product: (row, score), best first, ties by row.

    Exact for the vectors as they are stored, unless `bits` choose the `rescore * top` rows that are compared.

    Args:
        queries: (Q, D) float32.
        bits: `signs` of the vectors.
    """
    top = min(top, len(vectors))
    longest = vectors.longest if bits is None else 0.0
    results = []
    for query in queries:
        if bits is None:
            rough = vectors.product(query)
            least = np.partition(rough, len(rough) - top)[len(rough) - top]
            rows = np.flatnonzero(rough >= least - CLOSE * float(np.linalg.norm(query)) * longest)
        else:
            rows = np.sort(np.argsort(-sign_products(bits, query), kind="stable")[: max(1, rescore) * top])
        # row by row, unlike a BLAS product: equal vectors get equal scores wherever they stand
        scores = np.einsum("nd,d->n", vectors.take(rows).astype(np.float64), query.astype(np.float64))
        best = np.argsort(-scores, kind="stable")[:top]
        results.append([(int(rows[i]), float(scores[i])) for i in best])
    return results


def recall(
    whole: np.ndarray, vectors: Floats | Codes, bits: np.ndarray | None, num_queries: int = 200, at: int = 10
) -> dict[str, Any]:
    """How much of what the float32 vectors find the stored ones find: the mean share of the first `at` rows.

    Queries are rows of the index, spread evenly, each without itself. Real queries may fare otherwise.
    """
    at = min(at, len(whole) - 1)
    if at < 1:
        return {"at": 0, "queries": 0, "value": None}
    chosen = np.unique(np.linspace(0, len(whole) - 1, min(num_queries, len(whole))).astype(int))
    exact, shares = Floats(whole), []
    for row in chosen:
        query = whole[row : row + 1]
        true, found = (
            {i for i, _ in hits if i != row}
            for hits in (nearest(exact, query, at + 1)[0][: at + 1], nearest(vectors, query, at + 1, bits)[0])
        )
        shares.append(len(true & found) / len(true))
    return {"at": at, "queries": len(chosen), "value": round(float(np.mean(shares)), 4)}
