"""What a plan is worth: hard negatives that share a community, against random communities of the same rows."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from b3.mining.partition import choose_remainder, communities_of, random_labels
from b3.mining.rank import TEMPERATURE, TOP, WINDOW, Ranks
from b3.mining.vectors import DistinctTargets

BLOCK_VALUES = 1 << 22
BIN = 0.01
PERCENTILES = (10, 50, 90)


def quality(queries: np.ndarray, ranks: Ranks, distinct: DistinctTargets, communities: np.ndarray) -> dict[str, Any]:
    """Means over the rows in `communities` (C, K), and per-row counts.

    hits: (N,) other members of the community whose target is in the query's window (0 outside communities).
    mined_negatives_per_query: mean of `hits`.
    skipped_ranks_per_query: mean number of other members whose target is above rank p: likely false negatives.
    duplicate_targets_in_community: mean number of other members with the query's own target.
    teacher_mass_captured: mean over queries of H_B / H, the tightness of the paper's Theorem 1 (section 3.1) within
        the ranks that mining uses: H_B is the sum of exp(s / 0.02) over the distinct targets of the community that the
        query ranks at p or below, its own excluded; H is the same sum over the K - 1 largest such terms of the whole
        data set. In [0, 1]; 0 for K = 1.
    histogram: (200,) int64, scores of queries with the other members' targets, own target left out, in bins of 0.01.
    """
    sums = {"hits": 0, "skipped": 0, "copies": 0}
    mass = 0.0
    hits = np.zeros(len(ranks.own), dtype=np.int64)
    histogram = np.zeros(200, dtype=np.int64)
    for rows, members, scores, fresh in _member_scores(queries, distinct, communities):
        targets = ranks.own[members]
        order = np.argsort(rows)
        kinds = np.empty(members.shape, dtype=np.int8)
        repeated = np.repeat(rows[order], members.shape[1])
        kinds[order] = ranks.classify(repeated, targets[order].ravel()).reshape(members.shape)
        other = targets != ranks.own[rows][:, None]
        hits[rows] = (other & (kinds == WINDOW)).sum(axis=1)
        sums["hits"] += int(hits[rows].sum())
        sums["skipped"] += int((other & (kinds == TOP)).sum())
        sums["copies"] += int((~other).sum()) - len(rows)
        counted = other & (kinds != TOP) & fresh
        powers = np.exp(np.where(counted, scores - ranks.best[rows][:, None], -np.inf) / TEMPERATURE)
        mass += float((powers.sum(axis=1) / np.maximum(ranks.mass[rows], 1e-300)).clip(0, 1).sum())
        histogram += bins(scores[other])
    count = communities.size
    return {
        "hits": hits,
        "histogram": histogram,
        "mined_negatives_per_query": sums["hits"] / count,
        "skipped_ranks_per_query": sums["skipped"] / count,
        "duplicate_targets_in_community": sums["copies"] / count,
        "teacher_mass_captured": min(1.0, mass / count) if communities.shape[1] > 1 else 0.0,
    }


def bins(scores: np.ndarray) -> np.ndarray:
    """(200,) int64: how many scores fall into each bin of 0.01 from -1 to 1."""
    return np.bincount(np.clip((scores + 1) / BIN, 0, 199).astype(np.int64), minlength=200)


def _member_scores(
    queries: np.ndarray, distinct: DistinctTargets, communities: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of (rows (n,), members (n, K), exact scores (n, K), first member with its target (n, K) bool)."""
    num, size = communities.shape
    dim = queries.shape[1]
    together = max(1, BLOCK_VALUES // (size * max(size, dim)))
    for start in range(0, num, together):
        block = communities[start : start + together]
        targets = distinct.of_row[block]
        order = np.argsort(targets, axis=1, kind="stable")
        ordered = np.take_along_axis(targets, order, axis=1)
        fresh = np.empty(block.shape, dtype=bool)
        new = np.concatenate([np.ones((len(block), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
        np.put_along_axis(fresh, order, new, axis=1)
        wide = distinct.vectors[targets].astype(np.float64).transpose(0, 2, 1)
        step = max(1, BLOCK_VALUES // max(size, dim)) if len(block) == 1 else size
        for low in range(0, size, step):
            rows = block[:, low : low + step]
            scores = np.matmul(queries[rows].astype(np.float64), wide)
            shape = (rows.size, size)
            repeat = rows.shape[1]
            yield (
                rows.ravel(),
                np.repeat(block, repeat, axis=0),
                scores.reshape(shape),
                np.repeat(fresh, repeat, axis=0),
            )


def random_communities(num_rows: int, community_size: int, seed: int) -> np.ndarray:
    """(C, K) communities of a seeded permutation: what the partitioner `random` gives."""
    left_out = choose_remainder(None, num_rows, community_size, seed)
    rows = np.setdiff1d(np.arange(num_rows), left_out)
    return communities_of(random_labels(len(rows), community_size, seed), rows, community_size)


def random_expectation(ranks: Ranks, distinct: DistinctTargets, community_size: int) -> dict[str, float]:
    """Expected counts for communities drawn at random from all N rows: (K - 1) / (N - 1) of what exists."""
    counts, num = distinct.counts, len(ranks.own)
    share = (community_size - 1) / max(1, num - 1)
    totals = np.zeros(2)
    for start in range(0, num, 8192):
        order, own = ranks.order[start : start + 8192], ranks.own[start : start + 8192, None]
        size = np.where(order == own, 0, counts[order])
        totals += size[:, ranks.p :].sum(), size[:, : ranks.p].sum()
    return {
        "random_mined_negatives_per_query": float(totals[0] / num * share),
        "random_skipped_ranks_per_query": float(totals[1] / num * share),
        "random_duplicate_targets_in_community": float((counts[ranks.own] - 1).mean() * share),
    }


def make_report(
    queries: np.ndarray, ranks: Ranks, distinct: DistinctTargets, communities: np.ndarray, seed: int
) -> dict[str, Any]:
    """The measured part of report.json for communities (C, K)."""
    size = communities.shape[1]
    mined = quality(queries, ranks, distinct, communities)
    chance = quality(queries, ranks, distinct, random_communities(len(queries), size, seed + 1))
    hits, histogram = mined.pop("hits"), mined.pop("histogram")
    inside = np.sort(communities.ravel())
    return {
        "n": len(queries),
        "community_size": size,
        "num_communities": len(communities),
        "num_remainder": len(queries) - communities.size,
        "num_distinct_targets": len(distinct),
        "window": [ranks.p, ranks.p + ranks.m],
        **mined,
        **random_expectation(ranks, distinct, size),
        "random_teacher_mass_captured": chance["teacher_mass_captured"],
        "size_min": size,
        "size_max": size,
        "histogram": {
            "from": -1.0,
            "bin": BIN,
            "positive": bins(ranks.positive[inside]).tolist(),
            "community": histogram.tolist(),
            "random": chance["histogram"].tolist(),
        },
        **_hardness(communities, hits),
    }


def _hardness(communities: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
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


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
