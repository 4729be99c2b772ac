"""From a recipe and its plans to the batches of this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from b3 import distributed
from b3.config import Config
from b3.errors import RunError

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.train.sampler import BatchPlanSampler


def check_stored_negatives(config: Config, datasets: list[PairDataset]) -> None:
    """Raise `RunError` naming a data set whose rows bring no negatives along although the recipe trains with them."""
    for dataset in datasets:
        if config.negatives.source == "data" and not dataset.has_negatives:
            raise RunError(
                f"negatives.source data: {dataset.name} has no columns neg_text and neg_image_path; add them, or mine"
                " hard negatives with negatives.source mined"
            )


def load_plans(config: Config, datasets: list[PairDataset]) -> list[BatchPlan]:
    """The mined plan of each data set, checked against its rows; empty if the run reads none.

    Raises `RunError` naming the command that mines.
    """
    from b3.mining.recipe import load_plan

    if not config.needs_plan:
        return []
    return [load_plan(config, *pair) for pair in zip(config.data.datasets, datasets, strict=True)]


def build_sampler(
    config: Config, datasets: list[PairDataset], plans: list[BatchPlan], start: int = 0
) -> BatchPlanSampler:
    """Batches of this rank under the recipe's policy."""
    from b3.train.sampler import BatchPlanSampler, random_rows

    batch, entries = config.batch, config.data.datasets
    return BatchPlanSampler(
        plans if batch.mined else [random_rows(len(dataset)) for dataset in datasets],
        batch.size,
        names=[dataset.name for dataset in datasets],
        seed=config.seed,
        steps=config.train.steps,
        start=start,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        weights=[entry.weight for entry in entries],
        pools=pool_numbers(config),
        frozen=batch.remix == "frozen",
        random_steps=0 if batch.policy == "random" else batch.random_steps,
    )


def pool_numbers(config: Config) -> list[int]:
    """The pool of each data set: data sets of one pool share batches."""
    policy, entries = config.batch.policy, config.data.datasets
    if policy in ("b3_mixed", "random_mixed"):
        return [0] * len(entries)
    pools = list(range(len(entries)))
    if policy == "b3_merged":
        labelled = [number for number in pools if entries[number].family == "classification"]
        pools = [labelled[0] if number in labelled else number for number in pools]
    return pools
