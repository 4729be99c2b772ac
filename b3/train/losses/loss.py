"""What every loss is (`Loss`) and what it says about a batch (`statistics`).

A new loss is a subclass in a file of this folder and a line in `b3.registry.LOSSES`; `train.loss` names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from b3.errors import RunError

if TYPE_CHECKING:
    from b3.config import Config

FILE = "loss.safetensors"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a block of B rows and of all T columns beside their vectors; None: not there.

    target_ids: (T,) and query_ids: (n,) int64, equal for equal items; T = n (1 + h). valid: (T,) bool, False for
    padding. teacher_rows: (B, D') and teacher_columns: (T, D') a teacher's vectors, of any length; only for a loss that
    reads them (`Loss.reads_teacher`).
    """

    target_ids: Tensor
    query_ids: Tensor
    valid: Tensor | None = None
    teacher_rows: Tensor | None = None
    teacher_columns: Tensor | None = None

    def teacher_scores(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, T) the teacher's cosines of rows and columns."""
        assert self.teacher_rows is not None and self.teacher_columns is not None, "the teacher's vectors"
        return normalize(self.teacher_rows.to(dtype), dim=1) @ normalize(self.teacher_columns.to(dtype), dim=1).T

    def block(self, rows: slice) -> Facts:
        """Those of some of the rows."""
        return self if self.teacher_rows is None else replace(self, teacher_rows=self.teacher_rows[rows])


class Loss(nn.Module):
    """The loss of a block of rows against all columns of a batch; what is summed over rows may be cut into blocks.

    `b3.train.objective` gathers the columns of all ranks and cuts the rows; a loss sees neither ranks nor blocks. Its
    parameters, if any, are trained and stored with each checkpoint.
    """

    symmetric = False  # whether each positive is a row as well, against all queries
    reads_teacher = False  # whether the facts hold a teacher's vectors
    tables = 1  # tables of logits that a block of rows holds at once; the blocks are so many times smaller

    @classmethod
    def from_config(cls, config: Config) -> Loss:
        """The loss under a recipe's options."""
        return cls()

    def before_step(self) -> None:
        """Called before each step, to keep parameters in bounds."""

    def forward(self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
        """(sum of the rows' losses, their `statistics`).

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


@torch.no_grad()
def statistics(scores: Tensor, positives: Tensor, excluded: Tensor | None = None) -> Tensor:
    """(4,) float64 sums over the rows of a table of cosines (B, T): how hard and how well separated a batch is.

    In order: precision@1 (a tie with the positive counts as right), the positive's cosine, the hardest negative's, and
    the columns left out. `positives` (B,) int64 as in `Loss`; `excluded` (B, T) bool, True for a column left out.
    """
    positive = scores.gather(1, positives[:, None])[:, 0]
    num_excluded = torch.zeros((), device=scores.device)
    if excluded is not None:
        num_excluded, scores = excluded.sum(), scores.masked_fill(excluded, float("-inf"))
    hardest = scores.scatter(1, positives[:, None], float("-inf")).amax(dim=1)
    hardest = torch.where(torch.isfinite(hardest), hardest, torch.full_like(hardest, -1.0))
    sums = ((positive >= hardest).sum(), positive.sum(), hardest.sum(), num_excluded)
    return torch.stack([value.double() for value in sums])
