"""What a plan is worth: hard negatives that share a community, against random communities and the paper's recipe.

Also what the page shows of it: communities by hardness, likely false negatives, repeated targets, and hubs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from b3.console import Clock
from b3.mining.communities import find_communities
from b3.mining.graph import Problem
from b3.mining.rankings import TEMPERATURE, TOP, WINDOW, Rankings
from b3.mining.vectors import DistinctTargets

BLOCK_VALUES = 1 << 22
BIN = 0.01
MASS_BINS = 50
PERCENTILES = (10, 50, 90)
MOST_FALSE_NEGATIVES = 12
MOST_DUPLICATES = 4
MOST_HUBS = 10
HUB_SHARE = 100  # one target in this many counts as a hub
WINDOW_ROWS = 65536


def quality(
    queries: np.ndarray, rankings: Rankings, distinct: DistinctTargets, communities: np.ndarray
) -> dict[str, Any]:
    """Means over the rows in `communities` (C, K), and numbers by row (N,), which are 0 outside communities.

    hits: other members of the community whose target is in the query's window.
    mined_negatives_per_query: mean of `hits`.
    skipped_ranks_per_query: mean number of other members whose target is above rank p: likely false negatives.
    duplicate_targets_in_community: mean number of other members with the query's own target.
    negatives_above_positive_per_query: mean number of other members whose target, not the own one, the teacher scores
        above the own one: likely false negatives too, wherever they rank.
    queries_with_negatives_above_positive: share of queries with at least one of those.
    negatives_above_positive_by: mean difference of score of those; 0 if there are none.
    excess, nearest: the largest score of another member's target, own target left out, minus the score of the own
        one, and the first row of the community that has it; -inf and -1 where there is none.
    mass: H_B / H, the tightness of the paper's Theorem 1 (section 3.1) within the ranks that mining uses: H_B is the
        sum of exp(s / 0.02) over the distinct targets of the community that the query ranks at p or below, its own
        excluded; H is the same sum over the K - 1 largest such terms of the whole data set. In [0, 1]; 0 for K = 1.
    teacher_mass_captured: mean of `mass`.
    mass_histogram: (50,) int64, queries by `mass` in bins of 0.02.
    histogram: (200,) int64, scores of queries with the other members' targets, own target left out, in bins of 0.01.
    """
    num_rows = len(rankings.own)
    sums = {"skipped": 0, "copies": 0, "above": 0}
    hits, nearest = np.zeros(num_rows, dtype=np.int64), np.full(num_rows, -1, dtype=np.int64)
    mass, above_by, excess = np.zeros(num_rows), np.zeros(num_rows), np.full(num_rows, -np.inf)
    histogram = np.zeros(200, dtype=np.int64)
    for rows, members, scores, is_first in _member_scores(queries, distinct, communities):
        # All of these are (n, K): row i of the block against each member of its community, itself included.
        targets = rankings.own[members]
        kinds = _kinds(rankings, rows, targets)
        is_other = targets != rankings.own[rows][:, None]
        hits[rows] = (is_other & (kinds == WINDOW)).sum(axis=1)
        sums["skipped"] += int((is_other & (kinds == TOP)).sum())
        sums["copies"] += int((~is_other).sum()) - len(rows)
        # H_B over H: each target once, none above rank p; relative to the best score, so that exp does not overflow
        is_term = is_other & (kinds != TOP) & is_first
        powers = np.exp(np.where(is_term, scores - rankings.best[rows][:, None], -np.inf) / TEMPERATURE)
        mass[rows] = (powers.sum(axis=1) / np.maximum(rankings.mass[rows], 1e-300)).clip(0, 1)
        histogram += bins(scores[is_other])
        margin_over_positive = np.where(is_other, scores - rankings.positive[rows][:, None], -np.inf)
        best = np.arange(len(rows)), margin_over_positive.argmax(axis=1)
        excess[rows] = margin_over_positive[best]
        nearest[rows] = np.where(margin_over_positive[best] > -np.inf, members[best], -1)
        above_by[rows] = np.where(margin_over_positive > 0, margin_over_positive, 0).sum(axis=1)
        sums["above"] += int((margin_over_positive > 0).sum())
    count, inside = communities.size, np.sort(communities.ravel())
    return {
        "hits": hits,
        "mass": mass,
        "excess": excess,
        "nearest": nearest,
        "histogram": histogram,
        "mined_negatives_per_query": int(hits.sum()) / count,
        "skipped_ranks_per_query": sums["skipped"] / count,
        "duplicate_targets_in_community": sums["copies"] / count,
        "negatives_above_positive_per_query": sums["above"] / count,
        "queries_with_negatives_above_positive": int((excess > 0).sum()) / count,
        "negatives_above_positive_by": float(above_by[inside].sum()) / max(1, sums["above"]),
        "teacher_mass_captured": min(1.0, float(mass[inside].mean())),
        "mass_histogram": _mass_bins(mass[inside]),
    }


def bins(scores: np.ndarray) -> np.ndarray:
    """(200,) int64: how many scores fall into each bin of 0.01 from -1 to 1."""
    return np.bincount(np.clip((scores + 1) / BIN, 0, 199).astype(np.int64), minlength=200)


def _mass_bins(shares: np.ndarray) -> np.ndarray:
    return np.bincount(np.clip(shares * MASS_BINS, 0, MASS_BINS - 1).astype(np.int64), minlength=MASS_BINS)


def _kinds(rankings: Rankings, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(n, K) int8 of `Rankings.classify` for queries (n,) in any order and distinct targets (n, K)."""
    order = np.argsort(rows)
    kinds = np.empty(targets.shape, dtype=np.int8)
    repeated = np.repeat(rows[order], targets.shape[1])
    kinds[order] = rankings.classify(repeated, targets[order].ravel()).reshape(targets.shape)
    return kinds


def _member_scores(
    queries: np.ndarray, distinct: DistinctTargets, communities: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of (rows (n,), members (n, K), exact scores (n, K), first member with its target (n, K) bool).

    Blocks are large, n K up to 2**22, since `Rankings.classify` looks through all ranks for each of them.
    """
    num, size = communities.shape
    together = max(1, BLOCK_VALUES // size**2)
    step = size if size**2 <= BLOCK_VALUES else max(1, BLOCK_VALUES // size)
    for start in range(0, num, together):
        block = communities[start : start + together]
        targets = distinct.of_row[block]
        # sorted by target, a member is the first with its target where the one before has another
        order = np.argsort(targets, axis=1, kind="stable")
        ordered = np.take_along_axis(targets, order, axis=1)
        is_first = np.empty(block.shape, dtype=bool)
        new = np.concatenate([np.ones((len(block), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
        np.put_along_axis(is_first, order, new, axis=1)
        for low in range(0, size, step):
            rows = block[:, low : low + step]
            repeat = rows.shape[1]
            yield (
                rows.ravel(),
                np.repeat(block, repeat, axis=0),
                _products(queries, distinct.vectors, rows, targets).reshape(-1, size),
                np.repeat(is_first, repeat, axis=0),
            )


def _products(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B, r, K) float64 scores of the queries `rows` (B, r) with the distinct targets (B, K) of their community."""
    scores = np.empty((*rows.shape, targets.shape[1]))
    step = max(1, BLOCK_VALUES // (targets.shape[1] * queries.shape[1]))
    for start in range(0, len(rows), step):
        span = slice(start, start + step)
        wide = vectors[targets[span]].astype(np.float64).transpose(0, 2, 1)
        np.matmul(queries[rows[span]].astype(np.float64), wide, out=scores[span])
    return scores


def make_report(
    problem: Problem, communities: np.ndarray, negatives: np.ndarray | None = None, compare: bool = False
) -> dict[str, Any]:
    """The measured part of report.json.

    Args:
        problem: that was cut.
        communities: (C, K) of the plan.
        negatives: (N, h) hard negatives of the plan, -1 for none.
        compare: also measure the paper's recipe.

    Of `quality`, numbers without prefix are the plan's; `random_` ones are expected values for the first three counts
    and measured on one draw otherwise; `paper_` ones are measured. A plan that is itself random or the paper's is not
    made again to compare.
    """
    queries, rankings, distinct, options = problem.queries, problem.rankings, problem.distinct, problem.options
    of_plan = quality(queries, rankings, distinct, communities)
    measured = {"community": of_plan, "random": of_plan}
    if options.partitioner != "random":
        changed = {"partitioner": "random", "seed": options.seed + 1}
        measured["random"] = quality(queries, rankings, distinct, _others(problem, changed))
    if options.partitioner == "paper":
        measured["paper"] = of_plan
    elif compare:
        changed = {"partitioner": "paper", "edges": "mutual"}
        measured["paper"] = quality(queries, rankings, distinct, _others(problem, changed))
    size = options.community_size
    return {
        "n": len(queries),
        "community_size": size,
        "num_communities": len(communities),
        "num_remainder": len(queries) - communities.size,
        "num_distinct_targets": len(distinct),
        "window": [rankings.p, rankings.p + rankings.m],
        **_numbers(measured, random_expectation(rankings, distinct, size)),
        "size_min": size,
        "size_max": size,
        **_histograms(measured, rankings.positive[np.sort(communities.ravel())]),
        **community_examples(communities, of_plan["hits"]),
        "likely_false_negatives": likely_false_negatives(queries, rankings, of_plan["excess"], of_plan["nearest"]),
        "duplicate_examples": duplicate_examples(communities, distinct),
        "hubs": hubs(rankings, distinct, negatives),
    }


def _others(problem: Problem, changed: dict[str, Any]) -> np.ndarray:
    """(C, K) communities of the same rows under changed options."""
    options = problem.options.model_copy(update={"piece_rows": None, **changed})
    return find_communities(replace(problem, options=options, clock=Clock(), facts={}))[0]


def random_expectation(rankings: Rankings, distinct: DistinctTargets, community_size: int) -> dict[str, float]:
    """Expected counts for communities drawn at random from all N rows: (K - 1) / (N - 1) of what exists.

    A target in a window stands for all rows that carry it, hence the sums of `distinct.counts`.
    """
    counts, num = distinct.counts, len(rankings.own)
    share = (community_size - 1) / max(1, num - 1)
    totals = np.zeros(2)
    for start in range(0, num, 8192):
        rows = slice(start, start + 8192)
        for side, targets in enumerate((rankings.window(rows), rankings.skipped(rows))):
            totals[side] += counts[targets][targets != rankings.own[rows, None]].sum()
    return {
        "mined_negatives_per_query": float(totals[0] / num * share),
        "skipped_ranks_per_query": float(totals[1] / num * share),
        "duplicate_targets_in_community": float((counts[rankings.own] - 1).mean() * share),
    }


def _numbers(measured: dict[str, dict[str, Any]], expected: dict[str, float]) -> dict[str, float]:
    """The means of `quality`, with the prefix of what they were measured on; `expected` goes before a random draw."""
    numbers: dict[str, float] = {}
    for name, values in measured.items():
        prefix = "" if name == "community" else f"{name}_"
        numbers |= {prefix + key: value for key, value in values.items() if isinstance(value, float)}
    return numbers | {f"random_{key}": value for key, value in expected.items()}


def _histograms(measured: dict[str, dict[str, Any]], positive: np.ndarray) -> dict[str, Any]:
    """Histograms of similarities and of teacher mass; `positive`: scores of the own targets."""
    scores = {name: values["histogram"].tolist() for name, values in measured.items()}
    masses = {name: values["mass_histogram"].tolist() for name, values in measured.items()}
    masses = {"mined": masses.pop("community"), **masses}
    return {
        "histogram": {"from": -1.0, "bin": BIN, "positive": bins(positive).tolist(), **scores},
        "teacher_mass_histogram": {"from": 0.0, "bin": 1 / MASS_BINS, **masses},
    }


def community_examples(communities: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """Communities by hardness (mean hits of their members): percentiles, and one community at each as example.

    Args:
        communities: (C, K) rows.
        hits: (N,) of `quality`.
    """
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
    rows_left = np.flatnonzero(excess > 0)
    rows_left = rows_left[np.argsort(-excess[rows_left], kind="stable")]
    pairs: list[dict[str, Any]] = []
    while len(pairs) < MOST_FALSE_NEGATIVES and len(rows_left):
        row, other = int(rows_left[0]), int(nearest[rows_left[0]])
        if any(np.array_equal(queries[row], queries[shown["row"]]) for shown in pairs):
            rows_left = rows_left[1:]
            continue
        both_targets = rankings.own[[row, other]]
        pairs.append(
            {
                "row": row,
                "other_row": other,
                "positive_score": float(rankings.positive[row]),
                "negative_score": float(rankings.positive[row] + excess[row]),
                "positive_rank": _rank_of(rankings, row, int(both_targets[0])),
                "negative_rank": _rank_of(rankings, row, int(both_targets[1])),
            }
        )
        # no further pair with either target, as own or as other one
        own_is_shown = np.isin(rankings.own[rows_left], both_targets)
        other_is_shown = np.isin(rankings.own[nearest[rows_left]], both_targets)
        rows_left = rows_left[~(own_is_shown | other_is_shown)]
    return pairs


def _rank_of(rankings: Rankings, row: int, target: int) -> int | None:
    """Rank of a target for a query, counted from 0; None beyond p + m."""
    at = np.flatnonzero(rankings.order[row] == target)
    return int(at[0]) if at.size else None


def duplicate_examples(communities: np.ndarray, distinct: DistinctTargets) -> list[dict[str, Any]]:
    """The targets that most rows share with another member of their community, at most 4, ties by first row.

    Each entry: rows, the first two members of a community that share it (lowest community); members, how many rows in
    all share it with another member.
    """
    # (C, K), each community sorted by target: a member shares its target if the one before or after has the same
    targets = distinct.of_row[communities]
    order = np.argsort(targets, axis=1, kind="stable")
    ordered = np.take_along_axis(targets, order, axis=1)
    is_repeat = ordered[:, 1:] == ordered[:, :-1]
    edge = np.zeros((len(is_repeat), 1), dtype=bool)
    is_shared = np.concatenate([is_repeat, edge], axis=1) | np.concatenate([edge, is_repeat], axis=1)
    ids, first, counts = np.unique(ordered[is_shared], return_index=True, return_counts=True)
    rows = np.take_along_axis(communities, order, axis=1)[is_shared]
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
        is_own = window == rankings.own[start : start + WINDOW_ROWS, None]
        counts += np.bincount(window[~is_own], minlength=len(counts))
    order = np.argsort(-counts, kind="stable")
    top = order[: -(-len(order) // HUB_SHARE)]
    levels = np.frexp(counts.astype(np.float64))[1]  # 0 for 0, else 1 + floor(log2)
    histogram = np.bincount(levels)
    drawn = None
    if negatives is not None:
        drawn = np.bincount(distinct.of_row[negatives[negatives >= 0]], minlength=len(counts))
    first_row = distinct.rows[distinct.starts[:-1]]
    facts = {
        "mean": float(counts.mean()),
        "max": int(counts.max()),
        "p99": float(np.percentile(counts, 99)),
        "unused": float((counts == 0).mean()),
        "top_share": float(counts[top].sum() / max(1, counts.sum())),
        "histogram": histogram.tolist(),
        "targets": [
            {"row": int(first_row[u]), "windows": int(counts[u]), "drawn": None if drawn is None else int(drawn[u])}
            for u in order[:MOST_HUBS]
        ],
    }
    if drawn is not None:
        facts["drawn_top_share"] = float(drawn[top].sum() / max(1, drawn.sum()))
    return facts
