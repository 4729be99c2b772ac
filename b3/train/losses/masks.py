"""Which columns of a batch are no negatives of a query.

Three rules. By identity: equal targets, equal queries, padding. By the student's own scores: a negative that is scored
above the positive by more than a margin is taken for a false one (Qwen3-Embedding, arXiv 2506.05176, equation 2: margin
0.1). By a teacher's scores: a negative whose teacher score exceeds that of the positive minus a margin (positive-aware
mining of NV-Retriever, arXiv 2407.15831, section 4; with margin 0 the rule of GISTEmbed, arXiv 2402.16829).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from b3.train.losses.loss import Facts


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

    def excluded(self, scores: Tensor, positives: Tensor, facts: Facts) -> Tensor:
        """(B, T) bool, True where a column leaves a row's sum; a row's own positive always stays.

        Args:
            scores: (B, T) the student's cosines, without graph.
            positives: (B,) int64, the column of each row's positive.
            facts: of the rows and columns.
        """
        excluded = torch.zeros_like(scores, dtype=torch.bool)
        if self.duplicates:
            excluded |= facts.target_ids[positives][:, None] == facts.target_ids
            stride = len(facts.target_ids) // len(facts.query_ids)
            # column k (1 + h) is the positive of query k; hard negatives of an equal query stay negatives
            excluded[:, ::stride] |= facts.query_ids[positives // stride][:, None] == facts.query_ids
        if facts.valid is not None:
            excluded |= ~facts.valid
        if self.teacher_margin is not None:
            teacher_scores = facts.teacher_scores()
            excluded |= teacher_scores > teacher_scores.gather(1, positives[:, None]) - self.teacher_margin
        if self.margin is not None:
            excluded |= scores > scores.gather(1, positives[:, None]) + self.margin
        return excluded.scatter_(1, positives[:, None], False)
