"""Scores of each row's own candidates, and the metrics made of them, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from b3.data.datasets import EvalDataset


@dataclass(frozen=True, slots=True)
class SubsetScore:
    """Scores of one subset.

    predicted: (rows,) int64, index of the best candidate in each row's list; 0 is right, -1 means that the query could
        not be read.
    scores: per row (candidates,) float32; -inf for a candidate that could not be read.
    incomplete: (rows,) bool, rows with a query or candidate that could not be read. They stay in the denominator; one
        whose query or positive is missing counts as wrong.
    """

    name: str
    predicted: np.ndarray
    scores: list[np.ndarray]
    incomplete: np.ndarray

    @property
    def num_correct(self) -> int:
        return int((self.predicted == 0).sum())

    @property
    def num_rows(self) -> int:
        return len(self.predicted)

    @property
    def precision(self) -> float:
        return self.num_correct / self.num_rows


METRICS: dict[str, Callable[[SubsetScore], float]] = {  # of a `Task`; 0 to 1, higher is better
    "precision@1": lambda score: score.precision,
}


def row_scores(query: np.ndarray, candidates: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Dot products (C,) float32 of one query (D,) with its candidates, given as distinct vectors (U, D) and (C,) index.

    Every dot product is summed in the same order, so that equal candidates get equal scores. (A matrix-vector product
    does not promise that: in the reference a copy of the positive can win by 1e-8 and the row counts as wrong.)
    """
    return (candidates * query).sum(axis=1, dtype=np.float32)[index]


def score_subset(
    dataset: EvalDataset,
    vectors: np.ndarray,
    queries: np.ndarray,
    candidates: list[np.ndarray],
    round_targets: bool = False,
) -> SubsetScore:
    """Score all rows.

    Args:
        vectors: (U, D) float32 of distinct items.
        queries: (rows,) int64, the vector of each query.
        candidates: per row (C,) int64, the vectors of its candidates, the positive first.
        round_targets: round candidates' vectors to bfloat16 first, as the reference's target side does.

    The first maximum wins, so a tie with the positive counts as right.
    """
    predicted, scores = np.empty(len(queries), dtype=np.int64), []
    incomplete = np.zeros(len(queries), dtype=bool)
    for row, (query, index) in enumerate(zip(queries, candidates, strict=True)):
        distinct, inverse = np.unique(index, return_inverse=True)
        targets = rounded(vectors[distinct]) if round_targets else vectors[distinct]
        values = row_scores(vectors[query], targets, inverse)
        incomplete[row] = np.isnan(values).any()
        values = np.where(np.isnan(values), -np.inf, values).astype(np.float32)
        scores.append(values)
        predicted[row] = int(values.argmax()) if np.isfinite(values).any() else -1
        if predicted[row] == 0 and not np.isfinite(values[0]):
            predicted[row] = -1
    return SubsetScore(dataset.name, predicted, scores, incomplete)


def rounded(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) rounded to bfloat16 and normalised again in float32."""
    import torch

    values = torch.from_numpy(vectors).to(torch.bfloat16).float()
    return torch.nn.functional.normalize(values, dim=-1).numpy()
