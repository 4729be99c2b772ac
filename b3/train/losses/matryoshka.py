"""Any loss at several lengths of the vectors: Matryoshka representation learning (arXiv 2205.13147, equation 1).

    L = w_D L(D) + sum over m of w_m L(m)

L(m) is the loss of all vectors cut to their first m numbers and L2-normalised again, masks and teacher's part included.
The whole length D always counts: with weight 1, unless it is among the listed lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import normalize

from b3.train.losses.loss import Facts, Loss, Pairs


class Matryoshka(Loss):
    """The weighted sum of a loss at several lengths; statistics are those of the whole length.

    Args:
        loss: at one length. Its parameters count for all.
        weights: of each length; no length exceeds that of the vectors.
    """

    def __init__(self, loss: Loss, weights: Mapping[int, float]) -> None:
        super().__init__()
        self.loss = loss
        self.weights = dict(weights)
        self.symmetric, self.reads_teacher, self.directions = loss.symmetric, loss.reads_teacher, loss.directions
        self.tables = loss.tables * (1 + len(self.weights))

    def before_step(self) -> None:
        self.loss.before_step()

    def forward(
        self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts, pairs: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        width, more = rows.shape[1], () if pairs is None else (pairs,)
        loss, statistics = self.loss(rows, columns, positives, facts, *more)
        loss = loss * self.weights.get(width, 1.0)
        for dim, weight in self.weights.items():
            assert dim <= width, f"{dim} exceeds the vectors' {width} numbers"
            if dim < width:
                if pairs is not None:
                    more = (replace(pairs, positives=cut(pairs.positives, dim), queries=cut(pairs.queries, dim)),)
                loss = loss + weight * self.loss(cut(rows, dim), cut(columns, dim), positives, facts, *more)[0]
        return loss, statistics


def cut(vectors: Tensor, dim: int) -> Tensor:
    """The first `dim` numbers of (B, D) vectors, L2-normalised."""
    return normalize(vectors[:, :dim], dim=1)
