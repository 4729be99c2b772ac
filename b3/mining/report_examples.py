"""What the report shows of a plan: communities by hardness, likely false negatives, and hubs."""

from __future__ import annotations

from typing import Any

import numpy as np

from b3.mining.rankings import Rankings
from b3.mining.vectors import DistinctTargets

PERCENTILES = (10, 50, 90)
MOST_FALSE_NEGATIVES = 12
MOST_DUPLICATES = 4
MOST_HUBS = 10
HUB_SHARE = 100  # one target in this many counts as a hub
WINDOW_ROWS = 65536


def community_examples(communities: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """Communities by hardness (mean hits of their members): percentiles, and one community at each as example."""
    hardness = hits[communities].mean(axis=1)
    order = np.argsort(hardness, kind="stable")
    examples = []
    for percent in PERCENTILES:
        number = int(order[round(percent / 100 * (len(order) - 1))])
        rows = communities[number]
        examples.append(
            {
                "percentile": percent,
                "community": number,
                "mined_negatives_per_query": float(hardness[number]),
                "rows": rows.tolist(),
                "mined_negatives": hits[rows].tolist(),
            }
        )
    levels = {str(q): float(np.percentile(hardness, q)) for q in (0, 10, 25, 50, 75, 90, 100)}
    return {"hardness_percentiles": levels, "examples": examples}


def likely_false_negatives(
    queries: np.ndarray, rankings: Rankings, excess: np.ndarray, nearest: np.ndarray
) -> list[dict[str, Any]]:
    """The members that the teacher scores furthest above a query's own target, at most 12, the furthest first.

    Args:
        queries: (N, D) unit vectors.
        rankings: their ranking.
        excess: (N,) score of the best-scored other member minus that of the own target; ties by row.
        nearest: (N,) row of that member.

    No query (equal vectors are one) and no target, own or other, is shown twice. Each entry: row and other_row;
    positive_score and negative_score; positive_rank and negative_rank, counted from 0, None beyond p + m.
    """
    left = np.flatnonzero(excess > 0)
    left = left[np.argsort(-excess[left], kind="stable")]
    pairs: list[dict[str, Any]] = []
    while len(pairs) < MOST_FALSE_NEGATIVES and len(left):
        row, other = int(left[0]), int(nearest[left[0]])
        if any(np.array_equal(queries[row], queries[shown["row"]]) for shown in pairs):
            left = left[1:]
            continue
        pair = rankings.own[[row, other]]
        pairs.append(
            {
                "row": row,
                "other_row": other,
                "positive_score": float(rankings.positive[row]),
                "negative_score": float(rankings.positive[row] + excess[row]),
                "positive_rank": _rank(rankings, row, int(pair[0])),
                "negative_rank": _rank(rankings, row, int(pair[1])),
            }
        )
        left = left[~(np.isin(rankings.own[left], pair) | np.isin(rankings.own[nearest[left]], pair))]
    return pairs


def _rank(rankings: Rankings, row: int, target: int) -> int | None:
    at = np.flatnonzero(rankings.order[row] == target)
    return int(at[0]) if at.size else None


def duplicate_examples(communities: np.ndarray, distinct: DistinctTargets) -> list[dict[str, Any]]:
    """The targets that most rows share with another member of their community, at most 4, ties by first row.

    Each entry: rows, the first two members of a community that share it (lowest community); members, how many rows in
    all share it with another member.
    """
    targets = distinct.of_row[communities]
    order = np.argsort(targets, axis=1, kind="stable")
    ordered = np.take_along_axis(targets, order, axis=1)
    same = ordered[:, 1:] == ordered[:, :-1]
    edge = np.zeros((len(same), 1), dtype=bool)
    sharing = np.concatenate([same, edge], axis=1) | np.concatenate([edge, same], axis=1)
    ids, first, counts = np.unique(ordered[sharing], return_index=True, return_counts=True)
    rows = np.take_along_axis(communities, order, axis=1)[sharing]
    top = np.lexsort((ids, -counts))[:MOST_DUPLICATES]
    return [{"rows": rows[first[i] : first[i] + 2].tolist(), "members": int(counts[i])} for i in top]


def hubs(rankings: Rankings, distinct: DistinctTargets, negatives: np.ndarray | None) -> dict[str, Any]:
    """Targets that are in the windows of many queries.

    A target's count is the number of queries that have it in their window and do not own it. Of these counts: mean,
    max, p99; unused (share of targets in no window); top_share (share of all window entries that the most frequent 1 %
    of the targets take, at least one target); histogram of targets over counts [0, 1), [1, 2), [2, 4), [4, 8), ...
    With `negatives` (N, h) also drawn_top_share: the share of drawn hard negatives that are one of those 1 %.
    targets: the ten most frequent ones (ties by number), each with its first row, its count (windows), and how often it
    is drawn (None without `negatives`).
    """
    counts = np.zeros(len(distinct), dtype=np.int64)
    for start in range(0, len(rankings.own), WINDOW_ROWS):
        window = rankings.window(slice(start, start + WINDOW_ROWS))
        mine = window == rankings.own[start : start + WINDOW_ROWS, None]
        counts += np.bincount(window[~mine], minlength=len(counts))
    order = np.argsort(-counts, kind="stable")
    top = order[: -(-len(order) // HUB_SHARE)]
    levels = np.frexp(counts.astype(np.float64))[1]  # 0 for 0, else 1 + floor(log2)
    histogram = np.bincount(levels)
    drawn = None
    if negatives is not None:
        drawn = np.bincount(distinct.of_row[negatives[negatives >= 0]], minlength=len(counts))
    first = distinct.rows[distinct.starts[:-1]]
    found = {
        "mean": float(counts.mean()),
        "max": int(counts.max()),
        "p99": float(np.percentile(counts, 99)),
        "unused": float((counts == 0).mean()),
        "top_share": float(counts[top].sum() / max(1, counts.sum())),
        "histogram": histogram.tolist(),
        "targets": [
            {"row": int(first[u]), "windows": int(counts[u]), "drawn": None if drawn is None else int(drawn[u])}
            for u in order[:MOST_HUBS]
        ],
    }
    if drawn is not None:
        found["drawn_top_share"] = float(drawn[top].sum() / max(1, drawn.sum()))
    return found
