"""What a plan is worth: hard negatives that share a community, against random communities and the paper's recipe.

Also what the page shows of it: communities by hardness, and likely false negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from b3.console import Clock
from b3.mining.communities import find_communities
from b3.mining.graph import Problem
from b3.mining.rankings import TEMPERATURE, Rankings
from b3.mining.vectors import DistinctTargets

BLOCK_VALUES = 1 << 22
SCORE_BINS, MASS_BINS = 200, 50
PERCENTILES = (10, 50, 90)
MOST_FALSE_NEGATIVES = 12


def quality(
    queries: np.ndarray, rankings: Rankings, distinct: DistinctTargets, communities: np.ndarray
) -> dict[str, Any]:
    """Means over the rows in `communities` (C, K), and numbers by row (N,), which are 0 outside communities.

    hits, mined_negatives_per_query: other members of the community whose target is in the query's window, and the mean.
    skipped_ranks_per_query: mean number of other members whose target is above rank p: likely false negatives.
    duplicate_targets_in_community: mean number of other members with the query's own target.
    negatives_above_positive_per_query: mean number of other members whose target, not the own one, the teacher scores
        above the own one: likely false negatives too, wherever they rank.
    queries_with_negatives_above_positive: share of queries with at least one of those.
    negatives_above_positive_by: mean difference of score of those; 0 if there are none.
    excess, nearest: the largest score of another member's target, own target left out, minus the score of the own
        one, and the first row of the community that has it; -inf and -1 where there is none.
    teacher_mass_captured: mean of H_B / H, the tightness of the paper's Theorem 1 (section 3.1) within the ranks that
        mining uses: H_B is the sum of exp(s / 0.02) over the distinct targets of the community that the query ranks at
        p or below, its own excluded; H is the same sum over the K - 1 largest such terms of the whole data set. In
        [0, 1]; 0 for K = 1.
    mass_histogram: (50,) int64, queries by H_B / H in bins of 0.02.
    histogram: (200,) int64, scores of queries with the other members' targets, own target left out, in bins of 0.01.
    """
    hits, nearest = np.zeros(len(rankings), dtype=np.int64), np.full(len(rankings), -1, dtype=np.int64)
    mass, above_by, excess = np.zeros(len(rankings)), np.zeros(len(rankings)), np.full(len(rankings), -np.inf)
    histogram = np.zeros(SCORE_BINS, dtype=np.int64)
    num_skipped = num_copies = num_above = 0
    for rows, members, is_first, scores in _member_scores(queries, distinct, communities):
        # All of these are (B, r, K): r rows of each of B communities against each member, themselves included.
        row_ids, targets = rows[..., 0], rankings.target_ids[members]
        ranks = rankings.rank_of(rows, targets)
        is_other, is_skipped = targets != rankings.target_ids[rows], (ranks >= 0) & (ranks < rankings.p)
        hits[row_ids] = (is_other & (ranks >= rankings.p)).sum(axis=2)
        num_skipped += int((is_other & is_skipped).sum())
        num_copies += int((~is_other).sum()) - rows.size
        # H_B over H: each target once, none above rank p; relative to the best score, so that exp does not overflow
        is_term = is_other & ~is_skipped & is_first
        powers = np.exp(np.where(is_term, scores - rankings.best_scores[rows], -np.inf) / TEMPERATURE)
        mass[row_ids] = (powers.sum(axis=2) / np.maximum(rankings.total_mass[row_ids], 1e-300)).clip(0, 1)
        histogram += histogram_of(scores[is_other], -1, SCORE_BINS)
        margins = np.where(is_other, scores - rankings.positive_scores[rows], -np.inf)
        excess[row_ids] = margins.max(axis=2)
        best_members = np.take_along_axis(members[:, 0], margins.argmax(axis=2), axis=1)
        nearest[row_ids] = np.where(excess[row_ids] > -np.inf, best_members, -1)
        above_by[row_ids] = np.where(margins > 0, margins, 0).sum(axis=2)
        num_above += int((margins > 0).sum())
    count, inside = communities.size, np.sort(communities.ravel())
    return {
        "hits": hits,
        "excess": excess,
        "nearest": nearest,
        "histogram": histogram,
        "mined_negatives_per_query": int(hits.sum()) / count,
        "skipped_ranks_per_query": num_skipped / count,
        "duplicate_targets_in_community": num_copies / count,
        "negatives_above_positive_per_query": num_above / count,
        "queries_with_negatives_above_positive": int((excess > 0).sum()) / count,
        "negatives_above_positive_by": float(above_by[inside].sum()) / max(1, num_above),
        "teacher_mass_captured": min(1.0, float(mass[inside].mean())),
        "mass_histogram": histogram_of(mass[inside], 0, MASS_BINS),
    }


def histogram_of(values: np.ndarray, low: float, num_bins: int) -> np.ndarray:
    """(num_bins,) int64: how many values lie in each bin of equal width from `low` to 1; the ends take what exceeds."""
    places = (values - low) * num_bins / (1 - low)
    return np.bincount(np.clip(places, 0, num_bins - 1).astype(np.int64), minlength=num_bins)


def _member_scores(
    queries: np.ndarray, distinct: DistinctTargets, communities: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Rows (B, r, 1), r of each of B communities, and all members (B, 1, K), blocks of a bounded size in any order.

    With them: whether a member is the first with its target (B, 1, K), and exact scores (B, r, K) float64.
    """
    num, size = communities.shape
    targets = distinct.of_row[communities]
    is_first = np.zeros(communities.shape, dtype=bool)
    is_first.flat[np.unique(targets + len(distinct) * np.arange(num)[:, None], return_index=True)[1]] = True
    step = max(1, min(size, BLOCK_VALUES // size))
    together = max(1, BLOCK_VALUES // (size * max(step, queries.shape[1])))
    for start in range(0, num, together):
        block = slice(start, start + together)
        vectors = distinct.vectors[targets[block]].astype(np.float64).transpose(0, 2, 1)
        for low in range(0, size, step):
            rows = communities[block, low : low + step]
            scores = np.matmul(queries[rows].astype(np.float64), vectors)
            yield rows[..., None], communities[block, None], is_first[block, None], scores


def make_report(problem: Problem, communities: np.ndarray, compare: bool = False) -> dict[str, Any]:
    """The measured part of report.json: of the `problem` that was cut into `communities` (C, K).

    Of `quality`, numbers without prefix are the plan's; `random_` ones are expected values for the first three counts
    and measured on one draw otherwise; `paper_` ones, given with `compare`, are measured. A plan that is itself random
    or the paper's is not made again to compare.
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
        **_histograms(measured, rankings.positive_scores[np.sort(communities.ravel())]),
        **community_examples(communities, of_plan["hits"]),
        "likely_false_negatives": likely_false_negatives(queries, rankings, of_plan["excess"], of_plan["nearest"]),
    }


def _others(problem: Problem, changed: dict[str, Any]) -> np.ndarray:
    """(C, K) communities of the same rows under changed options."""
    options = problem.options.model_copy(update={"piece_rows": None, **changed})
    return find_communities(replace(problem, options=options, clock=Clock(), facts={}))[0]


def random_expectation(rankings: Rankings, distinct: DistinctTargets, community_size: int) -> dict[str, float]:
    """Expected counts for communities drawn at random from all N rows: (K - 1) / (N - 1) of what exists.

    A target in a window stands for all rows that carry it, hence the sums of `distinct.counts`.
    """
    counts, num = distinct.counts, len(rankings)
    share = (community_size - 1) / max(1, num - 1)
    totals = np.zeros(2)
    for start in range(0, num, 8192):
        rows = slice(start, start + 8192)
        for side, targets in enumerate((rankings.window(rows), rankings.skipped(rows))):
            totals[side] += counts[targets][targets != rankings.target_ids[rows, None]].sum()
    return {
        "mined_negatives_per_query": float(totals[0] / num * share),
        "skipped_ranks_per_query": float(totals[1] / num * share),
        "duplicate_targets_in_community": float((counts[rankings.target_ids] - 1).mean() * share),
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
    scores = {"positive": histogram_of(positive, -1, SCORE_BINS).tolist(), **scores}
    return {
        "histogram": {"from": -1.0, "bin": 2 / SCORE_BINS, **scores},
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
        excess, nearest: (N,) of `quality`; ties by row.

    No query (equal vectors are one) and no target, own or other, is shown twice. Each entry: row and other_row;
    positive_score and negative_score; positive_rank and negative_rank, counted from 0, None beyond p + m.
    """
    rows_left = np.flatnonzero(excess > 0)
    rows_left = rows_left[np.argsort(-excess[rows_left], kind="stable")]
    pairs: list[dict[str, Any]] = []
    while len(pairs) < MOST_FALSE_NEGATIVES and len(rows_left):
        row, other = int(rows_left[0]), int(nearest[rows_left[0]])
        if any(np.array_equal(queries[row], queries[pair["row"]]) for pair in pairs):
            rows_left = rows_left[1:]
            continue
        both_targets = rankings.target_ids[[row, other]]
        ranks = [rank if rank >= 0 else None for rank in rankings.rank_of(row, both_targets).tolist()]
        pairs.append(
            {
                "row": row,
                "other_row": other,
                "positive_score": float(rankings.positive_scores[row]),
                "negative_score": float(rankings.positive_scores[row] + excess[row]),
                "positive_rank": ranks[0],
                "negative_rank": ranks[1],
            }
        )
        # no further pair with either target, as own or as other one
        own_is_shown = np.isin(rankings.target_ids[rows_left], both_targets)
        other_is_shown = np.isin(rankings.target_ids[nearest[rows_left]], both_targets)
        rows_left = rows_left[~(own_is_shown | other_is_shown)]
    return pairs
