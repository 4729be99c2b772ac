"""The loss of a batch over all ranks and its gradient with respect to each rank's own vectors.

Each rank computes its own rows of the logits against all gathered columns, some rows at a time, so that the table of
logits never dominates memory. The loss is a sum over rows, hence each block of rows is differentiated and dropped
before the next one: the result is that of the whole table. Gradients of gathered columns are summed over ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from b3.distributed import rank, world_size
from b3.train.inputs import StepInputs
from b3.train.losses.loss import Facts, Loss, Pairs

BLOCK_LOGITS = 2**24  # logits held at once; 64 MiB in float32, about six times that with what autograd keeps


def gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient. Every rank must hold the same shape."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


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
    weight = 1 / (total * (2 if loss.symmetric else 1))

    def both(tensor: Tensor | None) -> tuple[Tensor, Tensor]:
        """(this rank's, all ranks') part of what the inputs hold."""
        assert tensor is not None, "the loss needs a teacher's vectors in the inputs"
        local = tensor.to(queries.device)
        return local, gather(local)

    query_ids, target_ids = both(inputs.query_ids)[1], both(inputs.target_ids)[1]
    of_pairs: dict[str, Any] = {
        "temperatures": None if inputs.temperatures is None else inputs.temperatures.to(queries.dtype),
        **{n: None if (v := getattr(inputs, n)) is None else both(v)[1] for n in ("known", "closed")},
    }
    facts = Facts(target_ids, query_ids, both(inputs.valid)[1] if stride > 1 else None, **of_pairs)
    reverse = Facts(query_ids, target_ids[::stride], is_reverse=True, **of_pairs)
    if loss.reads_teacher:
        (rows, all_rows), (columns, all_columns) = both(inputs.teacher_queries), both(inputs.teacher_targets)
        facts = replace(facts, teacher_rows=rows, teacher_columns=all_columns)
        reverse = replace(reverse, teacher_rows=columns[::stride], teacher_columns=all_rows)
    positives = targets[::stride]
    if len(loss.directions) > 1:
        sides = [queries, positives], [targets, queries]
        sums, gradients = _one_way(loss, *sides, numbers * stride, facts, weight, block_logits, reverse)
        query_grad, target_grad = gradients[0] + gradients[3], gradients[2]
        target_grad[::stride] += gradients[1]
    else:
        sums, (query_grad, target_grad) = _one_way(
            loss, [queries], [targets], numbers * stride, facts, weight, block_logits
        )
    sums[0] *= total
    if loss.symmetric:
        back, (positive_grad, more) = _one_way(loss, [positives], [queries], numbers, reverse, weight, block_logits)
        sums[0] += back[0] * total  # precision and cosines stay those of queries
        query_grad = query_grad + more
        target_grad[::stride] += positive_grad
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums / total, query_grad, target_grad


def _one_way(
    loss: Loss,
    rows: list[Tensor],
    columns: list[Tensor],
    positives: Tensor,
    facts: Facts,
    weight: float,
    block_logits: int,
    reverse: Facts | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """This rank's rows (B, D) against the columns (T, D) of all ranks, of which `columns` are this rank's.

    With `reverse` there are two of each: queries and positives as rows, targets and queries as columns (`Pairs`).
    Returns sums over the rows, (5,) float64 (`weight` times the loss, then the statistics), and the gradients of
    `weight` times the losses of all ranks with respect to `rows` and then `columns`.
    """
    row_leaves, column_leaves = (
        [tensor.detach().clone().requires_grad_(True) for tensor in side] for side in (rows, map(gather, columns))
    )
    step = max(1, block_logits // (len(column_leaves[0]) * loss.tables))
    sums = torch.zeros(5, dtype=torch.float64, device=positives.device)
    for start in range(0, len(positives), step):
        block = slice(start, start + step)
        pairs = () if reverse is None else (Pairs(row_leaves[1][block], column_leaves[1], reverse.block(block)),)
        value, statistics = loss(row_leaves[0][block], column_leaves[0], positives[block], facts.block(block), *pairs)
        (value * weight).backward()
        sums[0] += value.detach().double() * weight
        sums[1:] += statistics
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (*row_leaves, *column_leaves)]
    for number, own in enumerate(columns, start=len(rows)):
        if world_size() > 1:
            dist.all_reduce(gradients[number])
        gradients[number] = gradients[number][rank() * len(own) : (rank() + 1) * len(own)]
    return sums, gradients
