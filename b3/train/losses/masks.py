"""Which columns of a batch are no negatives of a query.

Three rules. By identity: equal targets, equal queries, targets that the data call right for the query, padding, and for
a query with a closed set of options whatever is none of them. By the student's own scores: a negative that is scored
above the positive by more than a margin is taken for a false one (Qwen3-Embedding, arXiv 2506.05176, equation 2: margin
0.1). By a teacher's scores: a negative whose teacher score exceeds that of the positive minus a margin (positive-aware
mining of NV-Retriever, arXiv 2407.15831, section 4; with margin 0 the rule of GISTEmbed, arXiv 2402.16829).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from b3.train.losses.loss import Facts, teacher_cosines


@dataclass(frozen=True, slots=True)
class Masks:
    """Which columns count: the one place that decides it.

    Args:
        duplicates: leave out equal targets, the positives of equal queries and a query's other positives. Padding,
            and what is not an option of a closed set, is left out in any case.
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
        excluded = self.identical(positives, facts)
        if self.teacher_margin is not None:
            teacher_scores = facts.teacher_scores()
            excluded |= teacher_scores > teacher_scores.gather(1, positives[:, None]) - self.teacher_margin
        if self.margin is not None:
            excluded |= scores > scores.gather(1, positives[:, None]) + self.margin
        return excluded.scatter_(1, positives[:, None], False)

    def identical(self, positives: Tensor, facts: Facts) -> Tensor:
        """(B, T) bool, True where ids and options alone decide; a row's own positive may be among them."""
        stride = len(facts.target_ids) // len(facts.query_ids)
        pair = positives // stride
        excluded = torch.zeros((len(positives), len(facts.target_ids)), dtype=torch.bool, device=positives.device)
        if self.duplicates:
            excluded |= facts.target_ids[positives][:, None] == facts.target_ids
            # column k (1 + h) is the positive of query k; hard negatives of an equal query stay negatives
            excluded[:, ::stride] |= facts.query_ids[pair][:, None] == facts.query_ids
            if facts.known is not None and facts.is_reverse:
                for right in facts.known.T:
                    excluded |= facts.query_ids[pair][:, None] == right
            elif facts.known is not None:
                for right in facts.known[pair].T:
                    excluded |= right[:, None] == facts.target_ids
        if facts.valid is not None:
            excluded |= ~facts.valid
        if facts.closed is not None:
            columns = torch.arange(len(facts.target_ids), device=positives.device) // stride
            excluded |= facts.closed[pair][:, None] & (columns != pair[:, None])
        return excluded

    def beside(
        self, direction: str, scores: Tensor, least: Tensor, positives: Tensor, facts: Facts, reverse: Facts
    ) -> Tensor:
        """(B, n or T) bool, what a row leaves out of one of the directions "qq", "tq" and "tt".

        Itself in qq, its own positive and hard negatives in tt, and by the rules above: queries and targets of pairs
        that have a query or a target in common, and with a margin whatever scores higher than the positive and that.

        Args:
            direction: of the scores.
            scores: (B, n or T) the student's cosines, without graph.
            least: (B, 1) cosine of each row's positive.
            positives: (B,) int64, as in `excluded`.
            facts, reverse: of queries to targets, and of targets to queries.
        """
        stride = len(facts.target_ids) // len(facts.query_ids)
        pair, side = positives // stride, facts if direction == "tt" else reverse
        excluded = self.identical(positives if direction == "tt" else pair, side)
        own = torch.arange(scores.shape[1], device=scores.device) // (stride if direction == "tt" else 1)
        own = own == pair[:, None]
        if direction == "qq":
            excluded |= self.identical(positives, facts)[:, ::stride]
        if self.teacher_margin is not None:
            rows = facts.teacher_rows if direction == "qq" else reverse.teacher_rows
            limit = facts.teacher_scores().gather(1, positives[:, None]) - self.teacher_margin
            excluded |= teacher_cosines(rows, side.teacher_columns) > limit
        if self.margin is not None:
            excluded |= scores > least + self.margin
        if direction != "tq":
            return excluded | own
        return torch.where(own, False if facts.closed is None else facts.closed[pair][:, None], excluded)
