"""Metrics of ranked lists, at 1, 5 and 10: hit, ndcg (two gains), precision, recall, F1, average precision, reciprocal
rank; by the formulas of VLM2Vec's evaluation (`RankingMetrics`, https://github.com/TIGER-AI-Lab/VLM2Vec).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

CUTS = (1, 5, 10)
NAMES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRICS = tuple(f"{name}@{k}" for name in NAMES for k in CUTS)
PAIRINGS = ("right", "reference")
GAINS: dict[str, Callable[[float], float]] = {"linear": lambda grade: grade, "exponential": lambda grade: 2**grade - 1}


def query_metrics(
    prediction: Sequence[str | int],
    labels: Sequence[str | int],
    grades: Sequence[float] | None = None,
    pairing: str = "right",
) -> dict[str, float]:
    """All of `METRICS` for one query.

    Args:
        prediction: ranked names, best first. A name that occurs twice counts once in hit, precision and recall, and
            twice in the discounted gain.
        labels: names of the right ones; repeated ones count once, with their highest grade.
        grades: of the labels, for ndcg; None: all 1.
        pairing: "right": each grade belongs to its label. "reference": the labels pass through a set first, as in the
            reference, so that grades land on other names; names that are not integers keep the right pairing, since
            the reference's result depends on its hash seed there.
    """
    right = set(labels)
    grade_of = _paired(labels, grades, pairing)
    ideal = sorted(grade_of.values(), reverse=True)
    is_hit = [name in right for name in prediction[: max(CUTS)]]
    values: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    for k in CUTS:
        hits = len(right.intersection(prediction[:k]))
        precision, recall = hits / k, hits / len(right) if right else 1.0
        ranks = [rank for rank, hit in enumerate(is_hit[:k], start=1) if hit]
        values["hit"][k] = float(hits > 0)
        values["precision"][k], values["recall"][k] = precision, recall
        values["f1"][k] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        precisions = sum(found / rank for found, rank in enumerate(ranks, start=1))
        values["map"][k] = precisions / min(len(right), k) if right else 0.0
        values["mrr"][k] = 1 / ranks[0] if ranks else 0.0
        for name, gain in GAINS.items():
            best = _discounted([gain(grade) for grade in ideal[:k]])
            found = _discounted([gain(grade_of.get(name, 0)) for name in prediction[:k]])
            values[f"ndcg_{name}"][k] = found / best if best else 0.0
    return {f"{name}@{k}": values[name][k] for name in NAMES for k in CUTS}


def _paired(labels: Sequence[str | int], grades: Sequence[float] | None, pairing: str) -> dict[str | int, float]:
    if grades is None:
        return dict.fromkeys(labels, 1)
    if pairing == "reference" and all(type(name) is int for name in labels):
        return dict(zip(set(labels), grades, strict=True))
    result: dict[str | int, float] = {}
    for name, grade in zip(labels, grades, strict=True):
        result[name] = max(grade, result.get(name, grade))
    return result


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
