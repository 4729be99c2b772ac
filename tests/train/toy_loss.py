"""A loss from outside the package, as a user would write one."""

from __future__ import annotations

import torch
from torch import Tensor

from b3.train.losses.loss import Facts, Loss, statistics


class Distance(Loss):
    """One minus the cosine of each row and its positive, times a learned weight; negatives do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
        scores = rows @ columns.T
        loss = self.weight * (1 - scores.gather(1, positives[:, None])).sum()
        return loss, statistics(scores.detach(), positives)
