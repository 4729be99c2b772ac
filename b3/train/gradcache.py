"""The cached contrastive step: the exact gradient of the whole-batch loss, with the memory of one chunk.

1. Every chunk is embedded without a graph. 2. The loss of the whole batch, over all ranks, gives the gradient with
respect to each vector. 3. Every chunk is embedded again with a graph, and its vectors pull their cached gradient back
into the parameters. The random state of a chunk is a function of (seed, step, rank, chunk), so dropout is the same in
both passes and after a resume. (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup"; the step is the authors' `grad_cache`, the distribution is ours.)

Each rank computes its own rows of the logits against all gathered targets. Parameter gradients are summed over ranks
once a step, after the last chunk, so ranks may hold different numbers of chunks and chunks may touch different
parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from b3.distributed import rank, world_size
from b3.model.embedder import Batch, Embedder
from b3.train.loss import BatchStatistics, excluded_columns, info_nce


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some of a rank's distinct items, as one forward pass takes them.

    rows: (B,) int64 positions among the rank's distinct items.
    """

    batch: Batch
    rows: Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One rank's share of a batch: b rows, each with a positive and h hard negatives.

    chunks: cover the rank's distinct items.
    query_index: (b,) and target_index: (b (1 + h),) int64 positions among them.
    query_ids: (b,) and target_ids: (b (1 + h),) int64, equal for equal items.
    valid: (b (1 + h),) bool, False for padding.
    """

    chunks: Sequence[Chunk]
    query_index: Tensor
    target_index: Tensor
    query_ids: Tensor
    target_ids: Tensor
    valid: Tensor
    num_tokens: int = 0

    @property
    def num_items(self) -> int:
        return sum(len(chunk.rows) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step reports: means over the queries of all ranks."""

    loss: float
    precision: float
    positive: float
    hardest_negative: float


def gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient. Every rank must hold the same shape."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def chunk_seed(seed: int, step: int, position: int) -> int:
    """The random seed of a chunk on this rank (63 bits)."""
    text = f"{seed}/{step}/{rank()}/{position}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class CachedStep:
    """Computes loss and gradients of one batch; parameters' `.grad` hold the gradient of the global mean afterwards.

    Args:
        embedder: the model; called directly, never through a DDP wrapper.
        temperature: of InfoNCE.
        mask_duplicates: leave columns that are known to be right out of a query's sum, see `excluded_columns`.
        seed: of dropout.
        autocast: run the backbone under bfloat16 autocast.
    """

    def __init__(
        self,
        embedder: Embedder,
        temperature: float = 0.02,
        mask_duplicates: bool = True,
        seed: int = 0,
        autocast: bool = False,
    ) -> None:
        self.embedder = embedder
        self.temperature = temperature
        self.mask_duplicates = mask_duplicates
        self.seed = seed
        self.autocast = autocast

    def __call__(self, inputs: StepInputs, step: int) -> StepResult:
        """Run one step. `step` only decides the random state of dropout."""
        device = self.embedder.device
        single = len(inputs.chunks) == 1
        if single:
            vectors = self._embed(inputs.chunks[0], step, 0)
            restored = torch.empty_like(vectors.detach())
            restored[inputs.chunks[0].rows.to(device)] = vectors.detach()
        else:
            restored = self._embed_without_graph(inputs, step, device)
        result, gradient = self._loss(restored, inputs, device)
        for position, chunk in enumerate(inputs.chunks):
            if not single:
                vectors = self._embed(chunk, step, position)
            if vectors.requires_grad:  # a text-only chunk does not touch an adapter that sits in the vision tower
                torch.autograd.backward(vectors, gradient[chunk.rows.to(device)])
        reduce_gradients(self.embedder)
        return result

    def _embed(self, chunk: Chunk, step: int, position: int) -> Tensor:
        torch.manual_seed(chunk_seed(self.seed, step, position))
        with self._precision():
            return self.embedder(chunk.batch.to(self.embedder.device))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self.embedder.device.type, torch.bfloat16, enabled=self.autocast):
            yield

    @torch.no_grad()
    def _embed_without_graph(self, inputs: StepInputs, step: int, device: torch.device) -> Tensor:
        """Vectors (distinct items, D) of all chunks, in item order."""
        restored = torch.empty(inputs.num_items, self.embedder.dim, device=device)
        for position, chunk in enumerate(inputs.chunks):
            restored[chunk.rows.to(device)] = self._embed(chunk, step, position)
        return restored

    def _loss(self, vectors: Tensor, inputs: StepInputs, device: torch.device) -> tuple[StepResult, Tensor]:
        """Global mean loss and its gradient with respect to this rank's distinct vectors (same shape)."""
        query_index, target_index = inputs.query_index.to(device), inputs.target_index.to(device)
        queries = vectors[query_index].requires_grad_(True)
        targets = gather(vectors[target_index]).requires_grad_(True)
        stride = len(target_index) // len(query_index)
        total = len(query_index) * world_size()
        positives = (rank() * len(query_index) + torch.arange(len(query_index), device=device)) * stride
        excluded = excluded_columns(
            positives,
            gather(inputs.target_ids.to(device)) if self.mask_duplicates else None,
            gather(inputs.query_ids.to(device)) if self.mask_duplicates else None,
            gather(inputs.valid.to(device)) if stride > 1 else None,
        )
        loss = (
            info_nce(queries, targets, self.temperature, positives=positives, excluded=excluded, reduction="sum")
            / total
        )
        loss.backward()
        assert queries.grad is not None and targets.grad is not None
        statistics = BatchStatistics.measure(queries, targets, positives, excluded)
        if world_size() > 1:
            dist.all_reduce(targets.grad)
        own = slice(rank() * len(target_index), (rank() + 1) * len(target_index))
        gradient = torch.zeros_like(vectors)
        gradient.index_add_(0, query_index, queries.grad)
        gradient.index_add_(0, target_index, targets.grad[own])
        sums = torch.tensor(
            [float(loss.detach()) * total, statistics.correct, statistics.positive, statistics.hardest_negative],
            dtype=torch.float64,
            device=device,
        )
        if world_size() > 1:
            dist.all_reduce(sums)
        return StepResult(*(sums / total).tolist()), gradient


def reduce_gradients(module: nn.Module) -> None:
    """Sum the gradients of trainable parameters over ranks, in one flat all-reduce a dtype."""
    if world_size() == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
