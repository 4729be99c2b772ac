"""InfoNCE over a whole batch.

For query i with positive column y(i), over all T target columns (positives and hard negatives of every row):

    loss_i = -log( exp(q_i . t_y(i) / tau) / sum over j of w_ij exp(q_i . t_j / tau) )

One direction, query to target; the mean over queries is the loss (paper, section 3; authors' code). Columns that are
known to be right as well may be taken out of a query's sum (`b3.train.losses.masks`). Options, all off in the paper:

* symmetric: the mean of this loss and the one from each positive to all queries (CLIP, arXiv 2103.00020, figure 3).
* learned temperature: log(1 / tau) is a parameter, its exponential kept at most 100 (CLIP, section 2.5).
* hardness: w_ij = exp(beta s_ij) for negatives, without gradient through w (LLaVE, arXiv 2503.04812, equation 5, with
  the model as its own judge; the form without normalisation of Robinson et al., arXiv 2010.04592). Else w_ij = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from b3.errors import RunError
from b3.train.losses.masks import above_positive

if TYPE_CHECKING:
    from b3.config.schema import TrainConfig

MAX_SCALE = 100.0
FILE = "loss.safetensors"


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


class ContrastiveLoss(nn.Module):
    """The loss of some rows of a batch under a recipe's options; its state is the learned temperature, if any.

    Args:
        temperature: tau, or its first value.
        mask_duplicates: leave columns that are known to be right out of a query's sum, see `excluded_columns`.
        mask_margin: leave out negatives that the student scores above the positive by more than this; None: off.
        mask_teacher_margin: leave out negatives whose teacher score exceeds the positive's less this; None: off.
        symmetric: add the direction from target to query.
        learn_temperature: make log(1 / tau) a parameter.
        hardness_weight: beta of the negatives' weights exp(beta s); 0: no weights.
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
        hardness_weight: float = 0.0,
    ) -> None:
        super().__init__()
        assert not learn_temperature or 1 / temperature <= MAX_SCALE + 1e-6, "checked in the recipe"
        self.temperature = temperature
        self.mask_duplicates = mask_duplicates
        self.mask_margin = mask_margin
        self.mask_teacher_margin = mask_teacher_margin
        self.symmetric = symmetric
        self.hardness_weight = hardness_weight
        start = torch.tensor(math.log(1 / temperature))
        self.log_scale = nn.Parameter(start) if learn_temperature else None

    @classmethod
    def from_config(cls, train: TrainConfig) -> ContrastiveLoss:
        return cls(
            train.temperature,
            mask_duplicates=train.mask == "duplicates",
            mask_margin=train.mask_margin,
            mask_teacher_margin=train.mask_teacher_margin,
            symmetric=train.symmetric,
            learn_temperature=train.learn_temperature,
            hardness_weight=train.hardness_weight,
        )

    def scale(self) -> Tensor | float:
        """1 / tau; differentiable if learned."""
        return 1 / self.temperature if self.log_scale is None else self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep a learned 1 / tau at most 100; called before each step."""
        if self.log_scale is not None:
            self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def forward(
        self, rows: Tensor, columns: Tensor, positives: Tensor, excluded: Tensor | None = None
    ) -> tuple[Tensor, BatchStatistics]:
        """(sum of the rows' losses, what they looked like).

        Args:
            rows: (B, D), L2-normalised.
            columns: (T, D), L2-normalised.
            positives: (B,) int64, the column of each row's positive.
            excluded: (B, T) bool, columns left out by identity or teacher; the student's margin is applied here.
        """
        scores = at_least_float32(rows) @ at_least_float32(columns).T
        seen = scores.detach()
        if self.mask_margin is not None:
            above = above_positive(seen, positives, self.mask_margin)
            excluded = above if excluded is None else excluded | above
        logits = scores * self.scale()
        if self.hardness_weight:
            logits = logits + (self.hardness_weight * seen).scatter_(1, positives[:, None], 0.0)
        if excluded is not None:
            logits = logits.masked_fill(excluded, float("-inf"))
        return cross_entropy(logits, positives, reduction="sum"), BatchStatistics.measure(seen, positives, excluded)

    def save(self, folder: Path) -> None:
        """Write what was learned beside a checkpoint's weights; nothing if the temperature is fixed."""
        from safetensors.torch import save_file

        if self.log_scale is not None:
            save_file({"log_scale": self.log_scale.detach().cpu().reshape(1)}, str(folder / FILE))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises `RunError` if the checkpoint was made with a fixed temperature."""
        from safetensors.torch import load_file

        if self.log_scale is None:
            return
        if not (folder / FILE).is_file():
            raise RunError(
                f"{folder} holds no {FILE}: its temperature was not learned; set train.learn_temperature=false"
            )
        self.log_scale.copy_(load_file(str(folder / FILE))["log_scale"][0])


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Sums over queries (0-d tensors), to be divided by their number: how hard and how well separated a batch is.

    correct: in-batch precision@1, a tie with the positive counts as right. positive, hardest_negative: cosines.
    masked: columns left out of the sum.
    """

    correct: Tensor
    positive: Tensor
    hardest_negative: Tensor
    masked: Tensor

    @classmethod
    @torch.no_grad()
    def measure(cls, scores: Tensor, positives: Tensor, excluded: Tensor | None) -> BatchStatistics:
        """Of a table of cosines (B, T); other shapes as in `info_nce`."""
        positive = scores.gather(1, positives[:, None])[:, 0]
        masked = torch.zeros((), dtype=torch.int64, device=scores.device) if excluded is None else excluded.sum()
        if excluded is not None:
            scores = scores.masked_fill(excluded, float("-inf"))
        hardest = scores.scatter(1, positives[:, None], float("-inf")).amax(dim=1)
        hardest = torch.where(torch.isfinite(hardest), hardest, torch.full_like(hardest, -1.0))
        return cls((positive >= hardest).sum(), positive.sum(), hardest.sum(), masked)

    def sums(self) -> Tensor:
        """(4,) float64, in the order of the fields."""
        fields = (self.correct, self.positive, self.hardest_negative, self.masked)
        return torch.stack([value.double() for value in fields])
