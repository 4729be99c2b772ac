"""The loss of a batch over all ranks and its gradient with respect to each rank's own vectors.

Each rank computes its own rows of the logits against all gathered columns, some rows at a time, so that the table of
logits never dominates memory. The loss is a sum over rows, hence each block of rows is differentiated and dropped
before the next one: the result is that of the whole table. Gradients of gathered columns are summed over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from b3.distributed import rank, world_size
from b3.train.inputs import StepInputs
from b3.train.losses.loss import Loss
from b3.train.losses.masks import Facts

BLOCK_LOGITS = 2**24  # logits held at once; 64 MiB in float32, about six times that with what autograd keeps


def gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient. Every rank must hold the same shape."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class _Side:
    """One direction: this rank's rows against the columns of all ranks.

    rows: (B, D) and columns: (T, D), leaves that collect gradients. positives: (B,) int64 column of each row.
    facts: of all rows and columns.
    """

    rows: Tensor
    columns: Tensor
    positives: Tensor
    facts: Facts

    def backward(self, loss: Loss, weight: float, block_logits: int) -> tuple[Tensor, Tensor]:
        """(sum of the rows' losses times `weight` as a 0-d float64, statistics (4,)); fills `.grad` of the leaves."""
        step = max(1, block_logits // len(self.columns))
        total = torch.zeros((), dtype=torch.float64, device=self.rows.device)
        statistics = torch.zeros(4, dtype=torch.float64, device=self.rows.device)
        for start in range(0, len(self.rows), step):
            block = slice(start, start + step)
            value, measured = loss(self.rows[block], self.columns, self.positives[block], self.facts.block(block))
            (value * weight).backward()
            total += value.detach().double() * weight
            statistics += measured.sums()
        return total, statistics


def whole_batch(
    loss: Loss, queries: Tensor, targets: Tensor, inputs: StepInputs, block_logits: int = BLOCK_LOGITS
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss over the queries of all ranks and its gradients.

    Args:
        loss: its parameters' `.grad`, if any, receive this rank's share.
        queries: (b, D) of this rank, L2-normalised, without graph; every rank holds as many.
        targets: (b (1 + h), D) of this rank: each row's positive followed by its h hard negatives.
        inputs: what the masks need.
        block_logits: upper bound of logits held at once (at least a row).

    Returns:
        (5,) float64: loss, precision@1, positive cosine, hardest negative's cosine and masked columns, each the mean
        over all queries; the gradients with respect to `queries` and `targets`.
    """
    b, stride = len(queries), len(targets) // len(queries)
    total, numbers = b * world_size(), torch.arange(b, device=queries.device) + rank() * b
    sides = [_forward_side(loss, queries, targets, inputs, numbers * stride)]
    if loss.symmetric:
        sides.append(_backward_side(loss, queries, targets[::stride], inputs, numbers))
    sums = torch.zeros(5, dtype=torch.float64, device=queries.device)
    for number, side in enumerate(sides):
        value, statistics = side.backward(loss, 1 / (total * len(sides)), block_logits)
        sums[0] += value * total
        if number == 0:  # precision and cosines are those of queries
            sums[1:] = statistics
    if world_size() > 1:
        dist.all_reduce(sums)
    query_grad, target_grad = _grad(sides[0].rows), _share_of_rank(sides[0].columns, len(targets))
    if loss.symmetric:
        query_grad = query_grad + _share_of_rank(sides[1].columns, b)
        target_grad[::stride] += _grad(sides[1].rows)
    return sums / total, query_grad, target_grad


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True)


def _forward_side(loss: Loss, queries: Tensor, targets: Tensor, inputs: StepInputs, positives: Tensor) -> _Side:
    """This rank's queries against the targets of all ranks."""
    device, is_padded = queries.device, len(targets) > len(queries)
    facts = Facts(
        gather(inputs.target_ids.to(device)),
        gather(inputs.query_ids.to(device)),
        gather(inputs.valid.to(device)) if is_padded else None,
    )
    if loss.reads_teacher:
        columns = gather(_teacher(inputs.teacher_targets).to(device))
        facts = replace(facts, teacher_rows=_teacher(inputs.teacher_queries).to(device), teacher_columns=columns)
    return _Side(_leaf(queries), _leaf(gather(targets)), positives, facts)


def _backward_side(
    loss: Loss, queries: Tensor, positive_targets: Tensor, inputs: StepInputs, positives: Tensor
) -> _Side:
    """This rank's positives against the queries of all ranks; the roles in the masks are exchanged with the roles."""
    device, stride = queries.device, len(inputs.target_ids) // len(inputs.query_ids)
    facts = Facts(gather(inputs.query_ids.to(device)), gather(inputs.target_ids[::stride].to(device)))
    if loss.reads_teacher:
        columns = gather(_teacher(inputs.teacher_queries).to(device))
        rows = _teacher(inputs.teacher_targets)[::stride].to(device)
        facts = replace(facts, teacher_rows=rows, teacher_columns=columns)
    return _Side(_leaf(positive_targets), _leaf(gather(queries)), positives, facts)


def _teacher(vectors: Tensor | None) -> Tensor:
    assert vectors is not None, "the loss needs a teacher's vectors in the inputs"
    return vectors


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _share_of_rank(columns: Tensor, count: int) -> Tensor:
    """Gradient of this rank's columns, summed over the rows of all ranks."""
    gradient = _grad(columns)
    if world_size() > 1:
        dist.all_reduce(gradient)
    return gradient[rank() * count : (rank() + 1) * count]
