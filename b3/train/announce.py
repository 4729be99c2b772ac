"""What a run is about to do, told in a few lines before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from b3.config import Config

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.train.batches import Plans
    from b3.train.sampler import BatchPlanSampler


def describe(config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, plans: Plans) -> str:
    """What is about to happen, in a few lines."""
    size, h = config.batch.size, config.negatives.per_query
    frozen = ", the same batches every epoch" if config.batch.remix == "frozen" else ""
    lines = [f"{config.name}: {config.train.steps} steps of {size} pairs, policy {config.batch.policy}{frozen}"]
    if config.batch.mined:
        lines[0] += f" ({_make_up(sampler, next(iter(sampler.epochs)))})"
    batches = {part.number: pool.num_batches for pool in sampler.pools for part in pool.parts if len(pool.parts) == 1}
    for index, (entry, dataset) in enumerate(zip(config.data.datasets, datasets, strict=True)):
        parts = [f"{len(dataset):,} rows"]
        if entry.weight != 1:
            parts.append(f"weight {entry.weight:g}")
        if index in batches and len(datasets) > 1:
            parts.append(f"{batches[index]} batches an epoch")
        for name, mined in plans.items():
            of_plan = f" ({name})" if len(plans) > 1 else ""
            hits = f"{mined[index].report['mined_negatives_per_query']:.2f}" if mined[index].measured else "imported"
            parts.append(f"{hits} mined negatives a query{of_plan}")
        lines.append(f"  {dataset.name}: {', '.join(parts)}")
    lines += [
        f"  batches across {pool.name}: {pool.num_batches} an epoch" for pool in sampler.pools if len(pool.parts) > 1
    ]
    lines += _describe_schedule(sampler)
    lines.append(
        f"  {sampler.batches_per_epoch} batches an epoch, {size * (1 + h) - 1:,} negatives a query"
        + (f" ({h} hard negatives a row)" if h else "")
    )
    if sampler.start:
        lines.append(f"  continuing at step {sampler.start}")
    return "\n".join(lines)


def _make_up(sampler: BatchPlanSampler, plan: str) -> str:
    """Of what a batch of a plan consists."""
    pool = sampler.epochs[plan].pools[0]
    random = f" and {pool.num_random_rows} random rows" if pool.num_random_rows else ""
    return f"{pool.intact} {'community' if pool.intact == 1 else 'communities'} of {pool.width}{random}"


def _describe_schedule(sampler: BatchPlanSampler) -> list[str]:
    """A line for each plan and each phase of a schedule."""
    if sampler.schedule is None:
        return []
    lines = [
        f"  plan {name}: {_make_up(sampler, name)} a batch, {epochs.num_batches} batches an epoch"
        for name, epochs in sampler.epochs.items()
    ]
    first = 0
    for until, shares in sampler.schedule.phases:
        mixed = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        lines.append(f"  steps {first + 1} to {until}: {mixed}")
        first = until
    return lines
