"""What every loss is (`Loss`) and what it says about a batch (`Statistics`).

A new loss is a subclass in a file of this folder and a line in `b3.registry.LOSSES`; `train.loss` names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from b3.errors import RunError
from b3.train.losses.masks import Facts

if TYPE_CHECKING:
    from b3.config import Config

FILE = "loss.safetensors"


class Loss(nn.Module):
    """The loss of a block of rows against all columns of a batch; what is summed over rows may be cut into blocks.

    `b3.train.objective` gathers the columns of all ranks and cuts the rows; a loss sees neither ranks nor blocks. Its
    parameters, if any, are trained and stored with each checkpoint.
    """

    symmetric = False  # whether each positive is a row as well, against all queries
    reads_teacher = False  # whether the facts hold a teacher's vectors

    @classmethod
    def from_config(cls, config: Config) -> Loss:
        """The loss under a recipe's options."""
        return cls()

    def before_step(self) -> None:
        """Called before each step, to keep parameters in bounds."""

    def forward(self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts) -> tuple[Tensor, Statistics]:
        """(sum of the rows' losses, what they looked like).

        Args:
            rows: (B, D), L2-normalised.
            columns: (T, D), L2-normalised.
            positives: (B,) int64, the column of each row's positive.
            facts: what else is known of rows and columns.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what was learned beside a checkpoint's weights; nothing if the loss has no parameters."""
        from safetensors.torch import save_file

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if state:
            save_file(state, str(folder / FILE))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises `RunError` if the checkpoint's loss had nothing to learn."""
        from safetensors.torch import load_file

        if not self.state_dict():
            return
        if not (folder / FILE).is_file():
            raise RunError(
                f"{folder} holds no {FILE}: its temperature was not learned; set train.learn_temperature=false"
            )
        self.load_state_dict(load_file(str(folder / FILE)))


@dataclass(frozen=True, slots=True)
class Statistics:
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
    def measure(cls, scores: Tensor, positives: Tensor, excluded: Tensor | None) -> Statistics:
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
