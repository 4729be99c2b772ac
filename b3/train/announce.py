"""What a run is about to do, told in a few lines before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from b3.config import Config

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.train.sampler import BatchPlanSampler


def describe(config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, plans: list[BatchPlan]) -> str:
    """What is about to happen, in a few lines."""
    size, h = config.batch.size, config.negatives.per_query
    frozen = ", the same batches every epoch" if config.mining.preset == "paper" else ""
    lines = [f"{config.name}: {config.train.steps} steps of {size} pairs, policy {config.batch.policy}{frozen}"]
    if config.batch.mined:
        pool = sampler.pools[0]
        lines[0] += f" ({pool.group} {'community' if pool.group == 1 else 'communities'} of {pool.width})"
    if config.model.train == "full" and config.adapter.changed():
        lines.append("  all weights are trained (model.train full): the section adapter is not used")
    batches = {part.number: pool.num_batches for pool in sampler.pools for part in pool.parts if len(pool.parts) == 1}
    for index, (entry, dataset) in enumerate(zip(config.data.datasets, datasets, strict=True)):
        parts = [f"{len(dataset):,} rows"]
        if entry.weight != 1:
            parts.append(f"weight {entry.weight:g}")
        if index in batches and len(datasets) > 1:
            parts.append(f"{batches[index]} batches an epoch")
        if plans:
            plan = plans[index]
            hits = f"{plan.report['mined_negatives_per_query']:.2f}" if plan.measured else "imported"
            parts.append(f"{hits} mined negatives per query")
        lines.append(f"  {dataset.name}: {', '.join(parts)}")
    lines += [
        f"  batches across {pool.name}: {pool.num_batches} an epoch" for pool in sampler.pools if len(pool.parts) > 1
    ]
    lines.append(
        f"  {sampler.batches_per_epoch} batches an epoch, {size * (1 + h) - 1:,} negatives a query"
        + (f" ({h} hard negatives a row)" if h else "")
    )
    if sampler.random_steps:
        lines.append(f"  steps 1 to {sampler.random_steps}: random batches of one data set")
    if sampler.start:
        lines.append(f"  continuing at step {sampler.start}")
    return "\n".join(lines)
