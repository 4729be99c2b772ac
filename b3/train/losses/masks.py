"""Which columns of a batch are no negatives of a query.

Three rules, each a (rows, columns) table of bool, True where a column leaves a row's sum; a row's own positive always
stays. By identity: equal targets, equal queries, padding. By the student's own scores: a negative that is scored above
the positive by more than a margin is taken for a false one (Qwen3-Embedding, arXiv 2506.05176, equation 2: margin 0.1).
By a teacher's scores: a negative whose teacher score exceeds that of the positive minus a margin (positive-aware mining
of NV-Retriever, arXiv 2407.15831, section 4; with margin 0 the rule of GISTEmbed, arXiv 2402.16829).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

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
    caption with two images), or if it is padding.

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
    positive_scores = scores.gather(1, positives[:, None])
    return (scores > positive_scores + margin).scatter_(1, positives[:, None], False)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a block of B rows and of all T columns beside their vectors; None: not there.

    target_ids, valid: (T,). query_ids: (n,), T = n (1 + h). teacher_rows: (B, D') and teacher_columns: (T, D') a
    teacher's vectors, of any length; only for a loss that reads them (`Loss.reads_teacher`).
    """

    target_ids: Tensor
    query_ids: Tensor
    valid: Tensor | None = None
    teacher_rows: Tensor | None = None
    teacher_columns: Tensor | None = None

    def block(self, rows: slice) -> Facts:
        """Those of some of the rows."""
        return self if self.teacher_rows is None else replace(self, teacher_rows=self.teacher_rows[rows])


@dataclass(frozen=True, slots=True)
class Masks:
    """Which columns count: the one place that decides it.

    Args:
        duplicates: leave out equal targets and the positives of equal queries. Padding is left out in any case.
        margin: leave out negatives that the student scores above the positive by more than this; None: off.
        teacher_margin: leave out negatives whose teacher score exceeds the positive's minus this; None: off.
    """

    duplicates: bool = True
    margin: float | None = None
    teacher_margin: float | None = None

    def excluded(self, scores: Tensor, positives: Tensor, facts: Facts) -> Tensor | None:
        """(B, T) bool, True where a column leaves a row's sum; None where all columns count.

        Args:
            scores: (B, T) the student's cosines, without graph.
            positives: (B,) int64, the column of each row's positive.
            facts: of the rows and columns.
        """
        target_ids, query_ids = (facts.target_ids, facts.query_ids) if self.duplicates else (None, None)
        tables = [excluded_columns(positives, target_ids, query_ids, facts.valid)]
        if self.teacher_margin is not None:
            assert facts.teacher_rows is not None and facts.teacher_columns is not None, "the teacher's vectors"
            teacher_rows = normalize(facts.teacher_rows.float(), dim=1)
            teacher_scores = teacher_rows @ normalize(facts.teacher_columns.float(), dim=1).T
            tables.append(above_positive(teacher_scores, positives, -self.teacher_margin))
        if self.margin is not None:
            tables.append(above_positive(scores, positives, self.margin))
        known = [table for table in tables if table is not None]
        return reduce(torch.logical_or, known) if known else None
