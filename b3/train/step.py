"""The cached contrastive step: the exact gradient of the whole-batch loss, with the memory of one chunk.

1. Every chunk is embedded without a graph. 2. The loss of the whole batch, over all ranks, gives the gradient with
respect to each vector. 3. Every chunk is embedded again with a graph, and its vectors pull their cached gradient back
into the parameters. The first chunks keep their graph from 1 on and are embedded once: one of them costs no memory,
since it is gone before the next graph is built. The random state of a chunk is a function of (seed, step, rank, chunk),
so dropout is the same in both passes and after a resume. (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup"; the step is the authors' `grad_cache`, the distribution is ours.)

Each rank computes its own rows of the logits against all gathered targets. Parameter gradients are summed over ranks
once per step, after the last chunk, so ranks may hold different numbers of chunks and chunks may touch different
parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from b3.distributed import rank, world_size
from b3.model.adapter import norms_once, under_autocast
from b3.model.batch import upload
from b3.model.embedder import Embedder
from b3.train.inputs import Chunk, StepInputs
from b3.train.losses.info_nce import InfoNCE
from b3.train.losses.loss import Loss
from b3.train.objective import BLOCK_LOGITS, whole_batch
from b3.train.vision_cache import VisionCache

REDUCE_ELEMENTS = 2**26  # gradients sent in one message
VISION_CACHE_MIB = 4096
READ_BY_LOSS = (
    "query_index", "target_index", "query_ids", "target_ids", "valid", "teacher_queries", "teacher_targets",
    "temperatures", "known", "closed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step reports: means over the queries of all ranks.

    masked: columns left out of a query's sum. vision_bytes: of the image features that this rank held.
    """

    loss: float
    precision: float
    positive: float
    hardest_negative: float
    masked: float
    vision_bytes: int


def chunk_seed(seed: int, step: int, position: int) -> int:
    """The random seed of a chunk on this rank (63 bits)."""
    text = f"{seed}/{step}/{rank()}/{position}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class CachedStep:
    """Computes loss and gradients of one batch; parameters' `.grad` hold the gradient of the global mean afterwards.

    Args:
        embedder: the model.
        loss: with its options; its parameters receive their gradient as well. Default: InfoNCE.
        seed: of dropout.
        autocast: run the backbone under bfloat16 autocast.
        vision_cache_mib: memory for image features kept between the passes (frozen vision tower only); 0: none.
        kept_chunks: chunks whose graphs are kept from the first pass; the memory of so many chunks.
        block_logits: logits held at once.
    """

    def __init__(
        self,
        embedder: Embedder,
        loss: Loss | None = None,
        *,
        seed: int = 0,
        autocast: bool = False,
        vision_cache_mib: int = VISION_CACHE_MIB,
        kept_chunks: int = 1,
        block_logits: int = BLOCK_LOGITS,
    ) -> None:
        self.embedder = embedder
        self.loss = (InfoNCE() if loss is None else loss).to(embedder.device)
        self.seed = seed
        self.autocast = autocast
        self.vision_cache_mib = vision_cache_mib
        self.kept_chunks = kept_chunks
        self.block_logits = block_logits

    def __call__(self, inputs: StepInputs, step: int) -> StepResult:
        """Run one step. `step` only decides the random state of dropout."""
        self.loss.before_step()
        limit = 0 if inputs.num_chunks <= self.kept_chunks else self.vision_cache_mib * 2**20
        cache = VisionCache(self.embedder, inputs.images, limit)
        with (under_autocast if self.autocast else norms_once)(self.embedder.backbone):
            loss, precision, positive, hardest, masked = self._passes(inputs, step, cache)
        reduce_gradients([*self.embedder.parameters(), *self.loss.parameters()])
        return StepResult(loss, precision, positive, hardest, masked, cache.num_bytes)

    def _passes(self, inputs: StepInputs, step: int, cache: VisionCache) -> list[float]:
        """Fill `.grad` of the parameters with this rank's share; returns the means of `_loss`."""
        inputs, chunks, groups = self._placed(inputs)
        parts: list[Tensor] = []
        for position, chunk in enumerate(chunks):
            with torch.set_grad_enabled(position < self.kept_chunks):
                parts.append(self._embed(chunk, position, step, cache))
        vectors = torch.cat([part.detach() for part in parts])
        means, gradient = self._loss(torch.empty_like(vectors).index_copy_(0, torch.cat(groups), vectors), inputs)
        for position, (chunk, group) in enumerate(zip(chunks, groups, strict=True)):
            part = parts[position] if position < self.kept_chunks else self._embed(chunk, position, step, cache)
            if part.requires_grad:  # a text-only chunk does not touch an adapter that sits in the vision tower
                torch.autograd.backward(part, gradient.index_select(0, group))
        return means

    def _placed(self, inputs: StepInputs) -> tuple[StepInputs, list[Chunk], list[Tensor]]:
        """What the step reads except patches, on the device: (inputs, chunks, item numbers of each chunk).

        Made and copied once, for both passes.
        """
        chunks = []
        for chunk in map(inputs.chunk, range(inputs.num_chunks)):
            chunks.append(replace(chunk, batch=replace(chunk.batch, layout=self.embedder.layout(chunk.batch))))
        groups = [torch.from_numpy(group) for group in inputs.groups]
        read = {name: getattr(inputs, name) for name in READ_BY_LOSS}
        read, chunks, groups = upload((read, chunks, groups), self.embedder.device)
        return replace(inputs, **read), chunks, groups

    def _embed(self, chunk: Chunk, position: int, step: int, cache: VisionCache) -> Tensor:
        torch.manual_seed(chunk_seed(self.seed, step, position))
        with torch.autocast(self.embedder.device.type, torch.bfloat16, enabled=self.autocast):
            return self.embedder(chunk.batch, features=cache.features(chunk))

    def _loss(self, vectors: Tensor, inputs: StepInputs) -> tuple[list[float], Tensor]:
        """Means over all queries and the loss's gradient with respect to this rank's distinct vectors (same shape)."""
        queries, targets = (vectors.index_select(0, index) for index in (inputs.query_index, inputs.target_index))
        means, query_grad, target_grad = whole_batch(self.loss, queries, targets, inputs, self.block_logits)
        gradient = torch.zeros_like(vectors)
        gradient.index_add_(0, inputs.query_index, query_grad)
        gradient.index_add_(0, inputs.target_index, target_grad)
        return means.tolist(), gradient  # what the host waits for


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of trainable parameters over ranks, in few messages of one dtype each."""
    if world_size() == 1:
        return
    trained = {id(p): p for p in parameters if p.requires_grad}  # a shared parameter once
    groups: dict[torch.dtype, list[Tensor]] = {}
    for parameter in trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        for message in _messages(gradients):
            flat = torch.cat([g.reshape(-1) for g in message])
            dist.all_reduce(flat)
            for gradient, part in zip(message, flat.split([g.numel() for g in message]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _messages(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut into runs of at most `REDUCE_ELEMENTS` elements (a larger one goes alone), the same on every rank."""
    message: list[Tensor] = []
    for gradient in gradients:
        if message and sum(g.numel() for g in message) + gradient.numel() > REDUCE_ELEMENTS:
            yield message
            message = []
        message.append(gradient)
    if message:
        yield message
