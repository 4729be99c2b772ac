"""InfoNCE over a whole batch.

For query i with positive column y(i), over all T target columns (positives and hard negatives of every row):

    loss_i = -log( exp(q_i . t_y(i) / tau) / sum over j of exp(q_i . t_j / tau) )

One direction, query to target; the mean over queries is the loss (paper, section 3; authors' code). Columns that are
known to be right as well may be taken out of a query's sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def positive_columns(num_queries: int, num_targets: int) -> Tensor:
    """(B,) int64: column i (1 + h) holds the positive of row i. Asserts that every row has the same h."""
    assert num_targets % num_queries == 0, f"{num_targets} targets do not divide by {num_queries} queries"
    return torch.arange(num_queries) * (num_targets // num_queries)


def excluded_columns(
    positives: Tensor,
    target_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor | None:
    """(B, T) bool, True where a column is no negative of a query; None where every column is.

    A column is left out if it equals the query's positive (a shared label), if it is the positive of an equal query (a
    caption with two pictures), or if it is padding.

    Args:
        positives: (B,) int64, the column of each query's positive.
        target_ids: (T,) int64, equal for equal targets.
        query_ids: (n,) int64 of all rows of the batch, T = n (1 + h), equal for equal queries.
        valid: (T,) bool, False for padding.
    """
    known = [t for t in (target_ids, valid) if t is not None]
    if not known:
        assert query_ids is None, "query_ids go with target_ids"
        return None
    num_targets = len(known[0])
    excluded = torch.zeros(len(positives), num_targets, dtype=torch.bool, device=positives.device)
    if target_ids is not None:
        excluded |= target_ids[positives][:, None] == target_ids[None, :]
    if query_ids is not None:
        stride = num_targets // len(query_ids)
        same = query_ids[positives // stride][:, None] == query_ids[None, :]
        excluded[:, ::stride] |= same  # hard negatives of an equal query stay negatives
    if valid is not None:
        excluded |= ~valid[None, :]
    return excluded.scatter_(1, positives[:, None], False)


def info_nce(
    queries: Tensor,
    targets: Tensor,
    temperature: float = 0.02,
    *,
    positives: Tensor | None = None,
    excluded: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The contrastive loss of a batch, a scalar in float32.

    Args:
        queries: (B, D), usually L2-normalised.
        targets: (T, D); without `positives`, T = B (1 + h): each row's positive followed by its h hard negatives.
        temperature: tau; 0.02 in the paper.
        positives: (B,) int64, the column of each query's positive.
        excluded: (B, T) bool, columns left out of a query's sum.
        reduction: "mean" or "sum" over queries.
    """
    if positives is None:
        positives = positive_columns(len(queries), len(targets)).to(queries.device)
    logits = queries.float() @ targets.float().T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    return cross_entropy(logits, positives, reduction=reduction)


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Sums over queries, to be divided by their number: how hard and how well separated a batch is."""

    correct: float
    positive: float
    hardest_negative: float

    @classmethod
    @torch.no_grad()
    def measure(cls, queries: Tensor, targets: Tensor, positives: Tensor, excluded: Tensor | None) -> BatchStatistics:
        """In-batch precision@1 (a tie with the positive counts as right) and cosines; shapes as in `info_nce`."""
        scores = queries.float() @ targets.float().T
        positive = scores.gather(1, positives[:, None])[:, 0]
        if excluded is not None:
            scores = scores.masked_fill(excluded, float("-inf"))
        hardest = scores.scatter(1, positives[:, None], float("-inf")).amax(dim=1)
        hardest = torch.where(torch.isfinite(hardest), hardest, torch.full_like(hardest, -1.0))
        return cls(float((positive >= hardest).sum()), float(positive.sum()), float(hardest.sum()))
