"""InfoNCE over a whole batch.

For query i with positive column y(i), over all T target columns (positives and hard negatives of every row):

    loss_i = -log( exp(q_i . t_y(i) / tau) / sum over j of exp(q_i . t_j / tau) )

One direction, query to target; the mean over queries is the loss (paper, section 3; authors' code). Columns that are
known to be right as well may be taken out of a query's sum (`b3.train.losses.masks`). Options, all off in the paper:

* symmetric: the mean of this loss and the one from each positive to all queries (CLIP, arXiv 2103.00020, figure 3).
* directions: more terms in the same sum over j (GTE, arXiv 2308.03281, section 3.2, has all four; Qwen3-Embedding,
  arXiv 2506.05176, equation 1, has qt, qq and tt). With P the positives, qq adds q_i . q_j for j != i, tt adds
  t_y(i) . t_j for all columns that are not of row i, tq adds q_j . t_y(i) for all j, row i's own pair once more
  (as GTE's formula has it).
* learned temperature: log(1 / tau) is a parameter, its exponential kept at most 100 (CLIP, section 2.5).
* distillation of a teacher's similarities over the same columns (`b3.train.losses.distill`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from b3.train.losses.distill import two_way_kl
from b3.train.losses.loss import Facts, Loss, Pairs, statistics
from b3.train.losses.masks import Masks

if TYPE_CHECKING:
    from b3.config import Config

MAX_SCALE = 100.0


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def info_nce(queries: Tensor, targets: Tensor, temperature: float = 0.02, *, excluded: Tensor | None = None) -> Tensor:
    """The contrastive loss of a batch, its mean over queries: a scalar in float32 (float64 if the vectors are).

    Args:
        queries: (B, D), usually L2-normalised.
        targets: (B (1 + h), D): each row's positive followed by its h hard negatives.
        temperature: tau; 0.02 in the paper.
        excluded: (B, B (1 + h)) bool, columns left out of a query's sum.
    """
    assert len(targets) % len(queries) == 0, f"{len(targets)} targets do not divide by {len(queries)} queries"
    positives = torch.arange(0, len(targets), len(targets) // len(queries), device=queries.device)
    logits = at_least_float32(queries) @ at_least_float32(targets).T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    return cross_entropy(logits, positives)


class InfoNCE(Loss):
    """The loss of some rows of a batch under a recipe's options; its state is the learned temperature, if any.

    Args:
        temperature: tau, or its first value.
        mask_duplicates, mask_margin, mask_teacher_margin: which columns count, see `Masks`.
        symmetric: add the direction from target to query.
        learn_temperature: make log(1 / tau) a parameter.
        distill_weight, distill_temperature: w (0: no distillation) and tau of the two-way KL to a teacher's rows.
        directions: "qt" and any of "qq", "tq", "tt".
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
        distill_weight: float = 0.0,
        distill_temperature: float = 0.02,
        directions: Sequence[str] = ("qt",),
    ) -> None:
        super().__init__()
        assert "qt" in directions and not (symmetric and len(directions) > 1), "checked in the recipe"
        assert not learn_temperature or 1 / temperature <= MAX_SCALE + 1e-6, "checked in the recipe"
        self.temperature = temperature
        self.masks = Masks(mask_duplicates, mask_margin, mask_teacher_margin)
        self.symmetric = symmetric
        self.distill_weight, self.distill_temperature = distill_weight, distill_temperature
        self.reads_teacher = mask_teacher_margin is not None or distill_weight > 0
        self.directions = tuple(directions)
        self.tables = len(directions) + (distill_weight > 0)
        start = torch.tensor(math.log(1 / temperature))
        self.log_scale = nn.Parameter(start) if learn_temperature else None

    @classmethod
    def from_config(cls, config: Config) -> InfoNCE:
        train = config.train
        distill = {} if train.distill is None else {f"distill_{k}": v for k, v in train.distill.model_dump().items()}
        temperature = train.temperature
        return cls(
            temperature if isinstance(temperature, float) else 1.0,  # each row has its own
            mask_duplicates=config.mining.preset != "paper",  # the authors' code masks nothing
            mask_margin=train.mask_margin,
            mask_teacher_margin=train.mask_teacher_margin,
            symmetric=train.symmetric,
            learn_temperature=train.learn_temperature,
            directions=train.directions,
            **distill,
        )

    def scale(self, temperatures: Tensor | None = None) -> Tensor | float:
        """1 / tau; differentiable if learned. (B, 1) where each row has a temperature of its own."""
        if temperatures is not None:
            return 1 / temperatures[:, None]
        return 1 / self.temperature if self.log_scale is None else self.log_scale.exp()

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep a learned 1 / tau at most 100."""
        if self.log_scale is not None:
            self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def forward(
        self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts, pairs: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = at_least_float32(rows) @ at_least_float32(columns).T
        excluded = self.masks.excluded(scores.detach(), positives, facts)
        table, is_out = scores, excluded
        if pairs is not None:
            least = scores.detach().gather(1, positives[:, None])
            more = self._beside(rows, columns, positives, least, facts, pairs)
            table, is_out = (torch.cat(parts, dim=1) for parts in zip((scores, excluded), *more, strict=True))
        logits = (table * self.scale(facts.temperatures)).masked_fill(is_out, float("-inf"))
        loss = cross_entropy(logits, positives, reduction="sum")
        if self.distill_weight:
            distance = two_way_kl(scores, facts.teacher_scores(scores.dtype), self.distill_temperature, excluded)
            loss = (1 - self.distill_weight) * loss + self.distill_weight * distance
        return loss, statistics(scores.detach(), positives, excluded)

    def _beside(
        self, rows: Tensor, columns: Tensor, positives: Tensor, least: Tensor, facts: Facts, pairs: Pairs
    ) -> list[tuple[Tensor, Tensor]]:
        """(cosines, which are left out) of each direction beside qt."""
        sides = {"q": (rows, pairs.queries), "t": (pairs.positives, columns)}
        tables = []
        for direction in self.directions:
            if direction != "qt":
                one, other = sides[direction[0]][0], sides[direction[1]][1]
                scores = at_least_float32(one) @ at_least_float32(other).T
                excluded = self.masks.beside(direction, scores.detach(), least, positives, facts, pairs.reverse)
                tables.append((scores, excluded))
        return tables
