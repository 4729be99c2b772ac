"""Vectors of a `RankedSet` become ranked lists of names, and what is kept of these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from b3.errors import DataError
from b3.eval.ranked import Name, RankedSet
from b3.eval.ranking_metrics import METRICS, query_metrics
from b3.eval.score import row_scores
from b3.model.encode import Encoder, ItemError, unique_items, unit

BLOCK_SCORES = 1 << 22  # scores held at a time
KEPT = 10  # best candidates of each query that are kept for metrics and pages


@dataclass(frozen=True, slots=True)
class Ranked:
    """The ranking of one query.

    names: of the candidates, best first; empty if the query could not be read, without those that could not.
    scores: (len(names),) float32.
    """

    names: list[Name]
    scores: np.ndarray
    is_complete: bool


@dataclass(slots=True)
class Ranking:
    """What is kept of all rankings of a task.

    values: by metric (queries,) float64. best: the first `KEPT` of each ranking. right: per query (name, score,
    rank) of the right candidate that is ranked highest, or None. incomplete: (queries,) bool, whether
    something could not be read.
    """

    name: str
    values: dict[str, np.ndarray]
    best: list[Ranked]
    right: list[tuple[Name, float, int] | None]
    incomplete: np.ndarray

    @classmethod
    def empty(cls, dataset: RankedSet) -> Ranking:
        """Of no query yet."""
        values = {metric: np.zeros(len(dataset)) for metric in METRICS}
        return cls(dataset.name, values, [], [], np.zeros(len(dataset), dtype=bool))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of a set: (U, D) float32 distinct ones, and which of them each query and each candidate has."""

    vectors: np.ndarray
    queries: np.ndarray
    candidates: np.ndarray


def encode_set(dataset: RankedSet, encoder: Encoder, normalize: bool = True, progress: bool = False) -> Encoded:
    """Vectors of all queries and candidates, each distinct item once; a collective call.

    Raises `DataError` naming the query or candidate that cannot be read, unless the encoder skips.
    """
    queries = [query.item for query in dataset.queries]
    items, index = unique_items([*queries, *dataset.candidates.values()])
    try:
        vectors = encoder.encode(items, dataset.name if progress else None)
    except ItemError as error:
        key = error.item.key
        row = next((row for row, item in enumerate(queries) if item.key == key), None)
        named = next((name for name, item in dataset.candidates.items() if item.key == key), None)
        where = f"row {row}" if row is not None else f"candidate {named!r}"
        raise DataError(f"{dataset.name} {where}: {error}, or give --on_error skip") from None
    return Encoded(unit(vectors) if normalize else vectors, index[: len(queries)], index[len(queries) :])


def rankings(dataset: RankedSet, encoded: Encoded) -> Iterator[Ranked]:
    """The ranking of each query in turn: by score, equal scores in the order of the candidates (stable).

    Candidates that are the same item have one vector and so exactly one score. Memory holds a block of queries' scores.
    """
    names = list(dataset.candidates)
    if dataset.is_local:
        place = {name: i for i, name in enumerate(names)}
        for query, row in zip(dataset.queries, encoded.queries, strict=True):
            own = query.info["cand_names"]
            rows, inverse = np.unique(encoded.candidates[[place[name] for name in own]], return_inverse=True)
            scores = row_scores(encoded.vectors[row], encoded.vectors[rows], inverse)
            yield _ranked(own, scores, encoded.vectors[row])
        return
    rows, inverse = np.unique(encoded.candidates, return_inverse=True)
    distinct = encoded.vectors[rows]
    block = max(1, BLOCK_SCORES // max(1, len(rows)))
    for start in range(0, len(dataset), block):
        index = encoded.queries[start : start + block]
        for scores, row in zip(encoded.vectors[index] @ distinct.T, index, strict=True):
            yield _ranked(names, scores[inverse], encoded.vectors[row])


def _ranked(names: list[Name], scores: np.ndarray, query: np.ndarray) -> Ranked:
    is_known = ~np.isnan(scores)
    order = np.argsort(np.where(is_known, -scores, np.inf), kind="stable")[: int(is_known.sum())]
    is_complete = bool(is_known.all()) and not bool(np.isnan(query).any())
    return Ranked([names[i] for i in order], scores[order], is_complete)


def collect(dataset: RankedSet, ranked: Iterator[Ranked], kept: Ranking) -> Iterator[Ranked]:
    """Each ranking in turn; what is kept of it goes to `kept`."""
    for row, (query, one) in enumerate(zip(dataset.queries, ranked, strict=True)):
        labels = set(query.labels)
        for metric, value in query_metrics(one.names, query.labels, query.grades, dataset.pairing).items():
            kept.values[metric][row] = value
        rank = next((i for i, name in enumerate(one.names) if name in labels), None)
        kept.right.append(None if rank is None else (one.names[rank], float(one.scores[rank]), rank + 1))
        kept.best.append(Ranked(one.names[:KEPT], one.scores[:KEPT], one.is_complete))
        kept.incomplete[row] = not one.is_complete
        yield one
