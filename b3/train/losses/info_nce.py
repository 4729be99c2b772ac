"""InfoNCE over a whole batch.

For query i with positive column y(i), over all T target columns (positives and hard negatives of every row):

    loss_i = -log( exp(q_i . t_y(i) / tau) / sum over j of exp(q_i . t_j / tau) )

One direction, query to target; the mean over queries is the loss (paper, section 3; authors' code). Columns that are
known to be right as well may be taken out of a query's sum (`b3.train.losses.masks`). Options, all off in the paper:

* symmetric: the mean of this loss and the one from each positive to all queries (CLIP, arXiv 2103.00020, figure 3).
* learned temperature: log(1 / tau) is a parameter, its exponential kept at most 100 (CLIP, section 2.5).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from b3.train.losses.loss import Loss, Statistics
from b3.train.losses.masks import Facts, Masks

if TYPE_CHECKING:
    from b3.config import Config

MAX_SCALE = 100.0


def positive_columns(num_queries: int, num_targets: int) -> Tensor:
    """(B,) int64: column i (1 + h) holds the positive of row i. Asserts that every row has the same h."""
    assert num_targets % num_queries == 0, f"{num_targets} targets do not divide by {num_queries} queries"
    return torch.arange(num_queries) * (num_targets // num_queries)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def info_nce(
    queries: Tensor,
    targets: Tensor,
    temperature: float = 0.02,
    *,
    positives: Tensor | None = None,
    excluded: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The contrastive loss of a batch, a scalar in float32 (float64 if the vectors are).

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
    logits = at_least_float32(queries) @ at_least_float32(targets).T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    return cross_entropy(logits, positives, reduction=reduction)


class InfoNCE(Loss):
    """The loss of some rows of a batch under a recipe's options; its state is the learned temperature, if any.

    Args:
        temperature: tau, or its first value.
        mask_duplicates, mask_margin, mask_teacher_margin: which columns count, see `Masks`.
        symmetric: add the direction from target to query.
        learn_temperature: make log(1 / tau) a parameter.
    """

    def __init__(
        self,
        temperature: float = 0.02,
        *,
        mask_duplicates: bool = True,
        mask_margin: float | None = None,
        mask_teacher_margin: float | None = None,
        symmetric: bool = False,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__()
        assert not learn_temperature or 1 / temperature <= MAX_SCALE + 1e-6, "checked in the recipe"
        self.temperature = temperature
        self.masks = Masks(mask_duplicates, mask_margin, mask_teacher_margin)
        self.symmetric = symmetric
        self.reads_teacher = mask_teacher_margin is not None
        start = torch.tensor(math.log(1 / temperature))
        self.log_scale = nn.Parameter(start) if learn_temperature else None

    @classmethod
    def from_config(cls, config: Config) -> InfoNCE:
        train = config.train
        return cls(
            train.temperature,
            mask_duplicates=config.mining.preset != "paper",  # the authors' code masks nothing
            mask_margin=train.mask_margin,
            mask_teacher_margin=train.mask_teacher_margin,
            symmetric=train.symmetric,
            learn_temperature=train.learn_temperature,
        )

    def scale(self) -> Tensor | float:
        """1 / tau; differentiable if learned."""
        return 1 / self.temperature if self.log_scale is None else self.log_scale.exp()

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep a learned 1 / tau at most 100."""
        if self.log_scale is not None:
            self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def forward(self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts) -> tuple[Tensor, Statistics]:
        """(sum of the rows' losses, what they looked like); shapes as in `Loss`."""
        scores = at_least_float32(rows) @ at_least_float32(columns).T
        seen = scores.detach()
        excluded = self.masks.excluded(seen, positives, facts)
        logits = scores * self.scale()
        if excluded is not None:
            logits = logits.masked_fill(excluded, float("-inf"))
        return cross_entropy(logits, positives, reduction="sum"), Statistics.measure(seen, positives, excluded)
