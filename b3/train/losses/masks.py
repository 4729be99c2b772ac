"""Which columns of a batch are no negatives of a query.

Three rules, each a (rows, columns) table of bool, True where a column leaves a row's sum; a row's own positive always
stays. By identity: equal targets, equal queries, padding. By the student's own scores: a negative that is scored above
the positive by more than a margin is taken for a false one (Qwen3-Embedding, arXiv 2506.05176, equation 2: margin 0.1).
By a teacher's scores: a negative whose teacher score exceeds that of the positive less a margin (positive-aware mining
of NV-Retriever, arXiv 2407.15831, section 4; with margin 0 the rule of GISTEmbed, arXiv 2402.16829).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


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


def above_positive(scores: Tensor, positives: Tensor, margin: float) -> Tensor:
    """(B, T) bool, True where a score exceeds that of the row's positive by more than `margin` (may be negative).

    Args:
        scores: (B, T) cosines.
        positives: (B,) int64, the column of each row's positive.
        margin: in units of cosine.
    """
    own = scores.gather(1, positives[:, None])
    return (scores > own + margin).scatter_(1, positives[:, None], False)


@dataclass(frozen=True, slots=True)
class Columns:
    """What is known of one direction's columns beside their vectors; None: not needed by the rules in use.

    target_ids, valid: (T,). query_ids: (n,), T = n (1 + h). teacher: (T, D) a teacher's vectors of any length.
    """

    target_ids: Tensor | None = None
    query_ids: Tensor | None = None
    valid: Tensor | None = None
    teacher: Tensor | None = None

    def excluded(self, positives: Tensor, teacher_rows: Tensor | None, teacher_margin: float | None) -> Tensor | None:
        """(B, T) bool by identity and by the teacher, or None.

        Args:
            positives: (B,) int64, the column of each row's positive.
            teacher_rows: (B, D), the teacher's vectors of the rows.
            teacher_margin: of the positive-aware rule; None: off.
        """
        excluded = excluded_columns(positives, self.target_ids, self.query_ids, self.valid)
        if teacher_margin is None:
            return excluded
        assert teacher_rows is not None and self.teacher is not None, "a teacher's margin needs a teacher's vectors"
        scores = normalize(teacher_rows.float(), dim=1) @ normalize(self.teacher.float(), dim=1).T
        above = above_positive(scores, positives, -teacher_margin)
        return above if excluded is None else excluded | above
