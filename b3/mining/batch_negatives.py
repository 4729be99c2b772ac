"""Hard negatives for a whole batch, drawn when the batch is composed (B3++ as the paper writes it, section 3.3).

Which communities share a batch changes with every epoch, so mining stores what each community would contribute: its
most frequent candidates and how often they occur. A batch adds up the counts of its communities and draws from the sum;
the draw is a pure function of (plan, rows of the batch, seed, step), equal on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from b3.errors import RunError
from b3.mining.hashing import mix64
from b3.mining.negatives import NegativeRules, count_scores, weighted_deal
from b3.mining.rankings import Ranks
from b3.mining.vectors import DistinctTargets

if TYPE_CHECKING:
    from b3.mining.plan import BatchPlan


def candidate_arrays(
    ranks: Ranks, distinct: DistinctTargets, communities: np.ndarray, remainder: np.ndarray, rules: NegativeRules
) -> dict[str, np.ndarray]:
    """The arrays of a `BatchPlan` that draws by batch need; targets are given as the first row that carries them.

    candidates: (G, C) int32, targets of each community (the remainder is the last group), -1 where there are fewer.
    candidate_scores: (G, C) float32, window occurrences minus penalties; the C largest by amount, ties by number.
    target_rows: (N,) int32, the target of each row.
    top_rows: (N, p) int32, the targets that each row ranks above p; only with ``filter: all``.
    """
    first_row = distinct.rows[distinct.starts[:-1]].astype(np.int32)
    groups = [*communities, *([remainder] if len(remainder) else [])]
    lists = []
    for members in groups:
        counted = count_scores(ranks, members, rules.penalty)
        kept = np.flatnonzero(counted.scores)
        kept = kept[np.argsort(-np.abs(counted.scores[kept]), kind="stable")][: rules.candidates]
        lists.append((first_row[counted.ids[kept]], counted.scores[kept]))
    width = max(len(rows) for rows, _ in lists)
    candidates = np.full((len(lists), width), -1, dtype=np.int32)
    scores = np.zeros((len(lists), width), dtype=np.float32)
    for group, (rows, values) in enumerate(lists):
        candidates[group, : len(rows)], scores[group, : len(rows)] = rows, values
    arrays = {"candidates": candidates, "candidate_scores": scores, "target_rows": first_row[ranks.own]}
    if rules.filter == "all":
        arrays["top_rows"] = first_row[ranks.order[:, : ranks.p]]
    return arrays


class BatchDraw:
    """Draws the hard negatives of batches of one data set.

    Args:
        plan: mined with negatives of scope "batch".

    Raises `RunError` if the plan holds no candidates.
    """

    def __init__(self, plan: BatchPlan) -> None:
        stored = plan.manifest.get("negatives")
        if plan.candidates is None or plan.candidate_scores is None or plan.target_rows is None or stored is None:
            raise RunError("the batch plan holds no candidates for draws by batch; mine it with negatives.scope batch")
        self.rules = NegativeRules(**stored)
        self.candidates, self.scores = plan.candidates, plan.candidate_scores.astype(np.float64)
        self.target_rows, self.top_rows = plan.target_rows, plan.top_rows
        self.carriers = np.bincount(self.target_rows, minlength=len(self.target_rows))
        count, size = plan.communities.shape
        self.group_of = np.full(len(self.target_rows), count, dtype=np.int64)
        self.group_of[plan.communities] = np.arange(count)[:, None]
        self.sizes = np.append(np.full(count, size), len(plan.remainder))

    def __call__(self, rows: np.ndarray, per_query: int, seed: int, step: int) -> np.ndarray:
        """(B, h) int64 row numbers whose targets are the negatives of each of `rows` (B,); -1 where there are too few.

        Pr(j) is proportional to the sum of j's scores over the communities of the batch; B * h targets are drawn
        without replacement. A community that is in the batch in part counts in part. Targets of the batch's rows are
        left out as the plan's rules say.
        """
        rows = np.asarray(rows, dtype=np.int64)
        groups, present = np.unique(self.group_of[rows], return_counts=True)
        listed = self.candidates[groups]
        share = np.repeat(present / self.sizes[groups], (listed >= 0).sum(axis=1))
        ids, at = np.unique(listed[listed >= 0], return_inverse=True)
        scores = np.bincount(at, weights=self.scores[groups][listed >= 0] * share, minlength=len(ids))
        own, carriers = np.unique(self.target_rows[rows], return_counts=True)
        if not self.rules.drop_member_labels:
            own = own[carriers == self.carriers[own]]
        scores[np.isin(ids, own)] = 0
        banned = np.zeros((len(rows), len(ids)), dtype=bool)
        if self.rules.filter == "all":
            assert self.top_rows is not None, "stored with this filter"
            refused = np.concatenate([self.top_rows[rows], self.target_rows[rows][:, None]], axis=1)
            place = np.minimum(np.searchsorted(ids, refused), max(0, len(ids) - 1))
            query, column = np.nonzero(ids[place] == refused) if len(ids) else (place[:0, 0], place[:0, 0])
            banned[query, place[query, column]] = True
        places = weighted_deal(scores, banned, per_query, self.rules, lambda copy: mix64(seed, 7, step, copy, ids))
        return np.where(places >= 0, ids[places], -1) if len(ids) else places


def draw_batch(plan: BatchPlan, rows: np.ndarray, per_query: int, seed: int, step: int) -> np.ndarray:
    """`BatchDraw` for a single batch."""
    return BatchDraw(plan)(rows, per_query, seed, step)
