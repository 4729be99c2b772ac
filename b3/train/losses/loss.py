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
    reads them (`Loss.reads_teacher`). temperatures: (B,) of each row, in place of the loss's own.
    known: (n, P) int64 ids of all targets that are right for each query. closed: (n,) bool, queries whose only
    negatives are their own hard negatives. is_reverse: the rows are positives and the columns queries, so that
    `target_ids` are those of queries and `query_ids` those of positives; `known` and `closed` stay those of queries.
    """

    target_ids: Tensor
    query_ids: Tensor
    valid: Tensor | None = None
    teacher_rows: Tensor | None = None
    teacher_columns: Tensor | None = None
    temperatures: Tensor | None = None
    known: Tensor | None = None
    closed: Tensor | None = None
    is_reverse: bool = False

    def teacher_scores(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, T) the teacher's cosines of rows and columns."""
        return teacher_cosines(self.teacher_rows, self.teacher_columns, dtype)

    def block(self, rows: slice) -> Facts:
        """Those of some of the rows."""
        teacher_rows, temperatures = (
            None if value is None else value[rows] for value in (self.teacher_rows, self.temperatures)
        )
        return replace(self, teacher_rows=teacher_rows, temperatures=temperatures)


def teacher_cosines(rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T) cosines of a teacher's vectors."""
    assert rows is not None and columns is not None, "the teacher's vectors"
    return normalize(rows.to(dtype), dim=1) @ normalize(columns.to(dtype), dim=1).T


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a loss of more directions than from queries to targets reads beside rows and columns.

    positives: (B, D) those of the rows. queries: (n, D) all of the batch. reverse: facts of `positives` as rows and
    `queries` as columns.
    """

    positives: Tensor
    queries: Tensor
    reverse: Facts


class Loss(nn.Module):
    """The loss of a block of rows against all columns of a batch; what is summed over rows may be cut into blocks.

    `b3.train.objective` gathers the columns of all ranks and cuts the rows; a loss sees neither ranks nor blocks. Its
    parameters, if any, are trained and stored with each checkpoint.
    """

    symmetric = False  # whether each positive is a row as well, against all queries
    reads_teacher = False  # whether the facts hold a teacher's vectors
    directions: tuple[str, ...] = ("qt",)  # more than this one: `forward` is given `Pairs` as well
    tables = 1  # tables of logits that a block of rows holds at once; the blocks are so many times smaller

    @classmethod
    def from_config(cls, config: Config) -> Loss:
        """The loss under a recipe's options."""
        return cls()

    def before_step(self) -> None:
        """Called before each step, to keep parameters in bounds."""

    def forward(
        self, rows: Tensor, columns: Tensor, positives: Tensor, facts: Facts, pairs: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """(sum of the rows' losses, their `statistics`).

        Args:
            rows: (B, D), L2-normalised.
            columns: (T, D), L2-normalised.
            positives: (B,) int64, the column of each row's positive.
            facts: what else is known of rows and columns.
            pairs: for `directions` beside "qt", else None.
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
