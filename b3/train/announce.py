"""What a run is about to do and what it will cost, told before its first step.

The cost (tokens, chunks, memory) is estimated from a sample of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.config.schema import AdapterConfig, Config
from b3.console import count, num_bytes
from b3.errors import DataError

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.data.items import Item
    from b3.mining.plan import BatchPlan
    from b3.model.batch import Processor
    from b3.model.embedder import Embedder
    from b3.train.sampler import BatchPlanSampler

SAMPLE_ROWS = 32


def describe(config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, plans: list[BatchPlan]) -> str:
    """What is about to happen, in a few lines."""
    size, h = config.batch.size, config.negatives.per_query
    frozen = ", the same batches every epoch" if config.mining.preset == "paper" else ""
    lines = [f"{config.name}: {config.train.steps} steps of {size} pairs, policy {config.batch.policy}{frozen}"]
    if config.batch.mined:
        pool = sampler.pools[0]
        lines[0] += f" ({pool.group} {'community' if pool.group == 1 else 'communities'} of {pool.width})"
    if config.model.train == "full" and config.adapter != AdapterConfig():
        lines.append("  all weights are trained (model.train full): the section adapter is not used")
    batches = {part.number: pool.num_batches for pool in sampler.pools for part in pool.parts if len(pool.parts) == 1}
    for index, (entry, dataset) in enumerate(zip(config.data.datasets, datasets, strict=True)):
        parts = [f"{len(dataset):,} rows"]
        if entry.weight != 1:
            parts.append(f"weight {entry.weight:g}")
        if index in batches and len(datasets) > 1:
            parts.append(f"{batches[index]} batches per epoch")
        if plans:
            plan = plans[index]
            hits = f"{plan.report['mined_negatives_per_query']:.2f}" if plan.measured else "imported"
            parts.append(f"{hits} mined negatives per query")
        lines.append(f"  {dataset.name}: {', '.join(parts)}")
    lines += [
        f"  batches across {pool.name}: {pool.num_batches} an epoch" for pool in sampler.pools if len(pool.parts) > 1
    ]
    lines.append(
        f"  {sampler.batches_per_epoch} batches per epoch, {size * (1 + h) - 1:,} negatives per query"
        + (f" ({h} hard negatives per row)" if h else "")
    )
    if sampler.random_steps:
        lines.append(f"  steps 1 to {sampler.random_steps}: random batches of one data set")
    if sampler.start:
        lines.append(f"  continuing at step {sampler.start}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures of one step, and memory of one rank in bytes."""

    tokens: int
    longest: int
    chunks: int
    weights: int
    states: int
    activations: int
    trainable: int
    parameters: int

    @property
    def memory(self) -> int:
        return self.weights + self.states + self.activations

    def lines(self) -> list[str]:
        """For the start of a run."""
        share = 100 * self.trainable / self.parameters
        return [
            f"  about {count(self.tokens)} tokens per step in about {self.chunks} chunk{'s' * (self.chunks > 1)}"
            f" per rank (longest item of a sample: {self.longest} tokens)",
            f"  {count(self.trainable)} of {count(self.parameters)} parameters are trained ({share:.2g} %)",
            f"  memory of a rank, about {num_bytes(self.memory)}: weights {num_bytes(self.weights)}, gradients and"
            f" optimiser {num_bytes(self.states)}, activations of a chunk {num_bytes(self.activations)}",
        ]


def estimate(config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, embedder: Embedder) -> Estimate:
    """Sample rows, count tokens without decoding images, and add up memory. Unreadable rows are left out."""
    weights = [entry.weight * len(d) for entry, d in zip(config.data.datasets, datasets, strict=True)]
    h, mean, longest = config.negatives.per_query, 0.0, 0
    for dataset, weight in zip(datasets, weights, strict=True):
        queries, targets = sample_lengths(dataset, embedder.processor)
        longest = max([longest, *queries, *targets])
        if queries:
            mean += weight / sum(weights) * float(np.mean(queries) + (1 + h) * np.mean(targets))
    tokens = round(mean * config.batch.size)
    per_rank = math.ceil(tokens / sampler.world_size)
    chunk = max(min(config.train.chunk_tokens, per_rank), longest)
    trainable = [p for p in embedder.parameters() if p.requires_grad]
    return Estimate(
        tokens=tokens,
        longest=longest,
        chunks=max(1, math.ceil(per_rank / config.train.chunk_tokens)),
        weights=sum(_local(p).numel() * p.element_size() for p in embedder.parameters()),
        states=sum(p.numel() * (p.element_size() + 8) for p in trainable),  # a gradient, and Adam's two moments
        activations=chunk * _kept_per_token(config, embedder),
        trainable=sum(p.numel() for p in trainable),
        parameters=sum(p.numel() for p in embedder.parameters()),
    )


def sample_lengths(dataset: PairDataset, processor: Processor) -> tuple[list[int], list[int]]:
    """Tokens of queries and targets of rows spread evenly over the data set."""
    queries, targets = [], []
    for row in np.linspace(0, len(dataset) - 1, min(SAMPLE_ROWS, len(dataset))).astype(int).tolist():
        try:
            query, target = (_length(processor, item) for item in (dataset.query(row), dataset.target(row)))
        except DataError:
            continue  # met again in training, where the policy for such rows applies
        queries.append(query)
        targets.append(target)
    return queries, targets


def _local(parameter: Any) -> Any:
    """What this rank holds of a parameter that may be sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _length(processor: Processor, item: Item) -> int:
    return processor.measure(item)[1]


def _kept_per_token(config: Config, embedder: Embedder) -> int:
    """Bytes kept for the backward pass per token of a chunk, for an adapter on the default targets."""
    cost = embedder.cost()
    size = 2 if config.train.bf16 or embedder.dtype.itemsize == 2 else 4
    adapted = config.model.train == "adapter"
    dora, dropout = adapted and config.adapter.use_dora, adapted and config.adapter.dropout > 0
    per_layer = cost.kept + cost.kept_dora * dora + cost.kept_dropout * dropout
    if config.model.gradient_checkpointing:  # each layer keeps its input, and one layer at a time everything
        layers = cost.num_layers + per_layer
    else:
        layers = cost.num_layers * per_layer
    return int(layers * cost.hidden_size * size)
