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
    from b3.model.embedder import Embedder, Tower
    from b3.train.sampler import BatchPlanSampler

SAMPLE_ROWS = 32
ROOM = 0.9  # of what is free on a GPU; the rest is for other libraries and for the estimate's own error


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
        if entry.closed:
            parts.append("closed: its own options are its only negatives")
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
    more = {"qq": size - 1, "tt": (size - 1) * (1 + h), "tq": size - 1}
    beside = [f"{more[name]:,} by {name}" for name in config.train.directions if name != "qt"]
    if beside:
        lines[-1] += f", and {', '.join(beside)}"
    first = "random batches of one data set"
    if config.negatives.after_random:
        first += " and without hard negatives"
    if sampler.random_steps is None:
        lines.append(f"  {first} until the student finds {config.batch.ready:.0%} of its targets there")
    elif sampler.random_steps:
        lines.append(f"  steps 1 to {sampler.random_steps}: {first}")
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
    features: int
    trainable: int
    parameters: int

    @property
    def memory(self) -> int:
        return self.weights + self.states + self.activations + self.features

    def lines(self) -> list[str]:
        """For the start of a run."""
        share = 100 * self.trainable / self.parameters
        return [
            f"  about {count(self.tokens)} tokens per step in about {self.chunks} chunk{'s' * (self.chunks > 1)}"
            f" per rank (longest item of a sample: {self.longest} tokens)",
            f"  {count(self.trainable)} of {count(self.parameters)} parameters are trained ({share:.2g} %)",
            f"  memory of a rank, about {num_bytes(self.memory)}: weights {num_bytes(self.weights)}, gradients and"
            f" optimiser {num_bytes(self.states)}, activations of a chunk {num_bytes(self.activations)}, image features"
            f" up to {num_bytes(self.features)}",
        ]


def estimate(config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, embedder: Embedder) -> Estimate:
    """Sample rows, count tokens without decoding images, and add up memory. Unreadable rows are left out."""
    from b3.train.vision_cache import is_vision_frozen

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
    features = 0
    if embedder.vision is not None and is_vision_frozen(embedder) and per_rank > config.train.chunk_tokens:
        features = min(
            config.train.vision_cache_mib * 2**20, per_rank * embedder.cost().text.width * embedder.dtype.itemsize
        )
    trainable = [p for p in embedder.parameters() if p.requires_grad]
    chunks = max(1, math.ceil(per_rank / config.train.chunk_tokens))
    return Estimate(
        tokens=tokens,
        longest=longest,
        chunks=chunks,
        weights=sum(_local(p).numel() * p.element_size() for p in embedder.parameters()),
        states=sum(p.numel() * (p.element_size() + 8) for p in trainable),  # a gradient, and Adam's two moments
        activations=activation_bytes(config, embedder, chunk) * min(config.train.kept_chunks, chunks),
        features=features,
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


# Backward works on one layer at a time; what it allocates there, as a share of what the layer kept (shapes of a GPU).
TEMPORARY, TEMPORARY_WITH_ADAPTER = 0.25, 0.35


def activation_bytes(config: Config, embedder: Embedder, tokens: int) -> int:
    """What a chunk of so many tokens adds at the peak of its backward pass, on a GPU.

    A trained vision tower counts as if all tokens stood for images: chunks begin with the longest items, which are
    these.
    """
    from b3.train.vision_cache import is_vision_frozen

    cost = embedder.cost()
    mixed = config.train.bf16 and embedder.dtype.itemsize == 4
    kept, layer = _kept_numbers(config, cost.text, mixed, tokens)
    share = TEMPORARY_WITH_ADAPTER if config.model.train == "adapter" else TEMPORARY
    peak, weights = kept + (share + config.model.gradient_checkpointing) * layer, cost.text.weights
    if cost.vision is not None and not is_vision_frozen(embedder):  # whose turn comes when all of the text is let go
        kept, layer = _kept_numbers(config, cost.vision, mixed, tokens * cost.patches)
        peak = max(peak + kept, kept + config.model.gradient_checkpointing * layer)
        weights += cost.vision.weights
    if mixed and not config.model.gradient_checkpointing:
        peak += weights  # autocast's 16-bit copies, which backward reads again
    size = 2 if config.train.bf16 or embedder.dtype.itemsize == 2 else 4
    return int(peak * size)


def _kept_numbers(config: Config, tower: Tower, mixed: bool, tokens: int) -> tuple[float, float]:
    """(numbers that a tower keeps for the backward pass, those that one of its layers keeps without checkpointing)."""
    kept, unit = tower.kept, tokens * tower.width
    layer = kept.layer + kept.mixed * mixed
    if config.model.train == "adapter":
        layer += kept.dora * config.adapter.use_dora + kept.dropout * (config.adapter.dropout > 0)
    # with checkpointing every layer keeps its input alone
    layers = tower.layers * (1 + mixed) if config.model.gradient_checkpointing else tower.depth * layer
    return (kept.outside + layers) * unit, layer * unit


def memory_note(told: Estimate, weights: int, free: int) -> str | None:
    """What to say before the first step if a GPU may be too small, else None.

    weights: bytes of the model, which the GPU holds already. free: bytes that are left on it.
    """
    needed = told.memory - weights
    if needed <= ROOM * free:
        return None
    return (
        f"about {num_bytes(needed)} are needed beside the weights, and {num_bytes(free)} of the GPU are free; lower"
        " train.chunk_tokens, or set model.gradient_checkpointing=true"
    )
