"""From a recipe to a trained adapter: build the parts, say what will happen, run, write what came out."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3 import __version__, distributed
from b3.config import Config
from b3.data.recipe import load_datasets
from b3.errors import RunError
from b3.files import write_atomic
from b3.train.checkpoint import RESULT, claim_folder, newest_checkpoint, read_metrics, rewind_metrics

if TYPE_CHECKING:
    from b3.data.records import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.model.embedder import Embedder
    from b3.train.sampler import BatchPlanSampler


def load_plans(config: Config, datasets: list[PairDataset]) -> list[BatchPlan] | None:
    """The mined plan of each data set, checked against its rows. Raises `RunError` naming the command that mines."""
    if not config.needs_plan:
        return None
    from b3.mining.recipe import load_plan

    return [load_plan(config, entry, dataset) for entry, dataset in zip(config.data.datasets, datasets, strict=True)]


def build_sampler(
    config: Config, datasets: list[PairDataset], plans: list[BatchPlan] | None, start: int = 0
) -> BatchPlanSampler:
    """Batches of this rank under the recipe's policy."""
    import numpy as np

    from b3.train.sampler import BatchPlanSampler, random_rows

    sizes = [len(dataset) for dataset in datasets]
    names = [dataset.name for dataset in datasets]
    communities: list[np.ndarray]
    if config.batch.policy == "b3":
        assert plans is not None
        communities = [plan.communities for plan in plans]
    elif config.batch.policy == "random":
        communities = [random_rows(size) for size in sizes]
    else:  # one pool: row numbers run over all data sets already
        communities, sizes, names = [random_rows(sum(sizes))], [sum(sizes)], ["all data sets"]
    return BatchPlanSampler(
        communities,
        config.batch.size,
        sizes=sizes,
        names=names,
        seed=config.seed,
        steps=config.train.steps,
        start=start,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def build_embedder(config: Config) -> Embedder:
    """The backbone with a fresh (or continued) trainable adapter, or with all its weights trainable."""
    from b3.model.embedder import Embedder
    from b3.model.freeze import freeze_matching, unfreeze_all

    model = config.model
    embedder = Embedder.from_pretrained(
        model.name,
        dtype="float32" if model.train == "full" else model.dtype,
        attention=model.attention,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        max_length=model.max_length,
        positions=model.positions,
    )
    if model.train == "full":
        unfreeze_all(embedder.backbone)
    else:
        _attach(embedder, config)
    if model.freeze:
        freeze_matching(embedder.backbone, model.freeze)
    if model.gradient_checkpointing:
        backbone: Any = embedder.backbone
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return embedder


def _attach(embedder: Embedder, config: Config) -> None:
    from transformers import set_seed

    from b3.model.adapter import PAPER_TARGETS, AdapterSpec, attach_adapter, load_trainable
    from b3.model.backbones import fetch

    spec = config.adapter
    targets = spec.target_modules
    set_seed(config.seed)  # the adapter's initial values
    embedder.backbone = attach_adapter(
        embedder.backbone,
        AdapterSpec(
            spec.r,
            spec.alpha,
            spec.dropout,
            spec.use_dora,
            spec.init,
            PAPER_TARGETS if targets is None else targets if isinstance(targets, str) else tuple(targets),
        ),
    )
    if config.model.init_adapter is not None:
        load_trainable(embedder.backbone, fetch(config.model.init_adapter))


def check_ranks(config: Config) -> None:
    """Raise `RunError` if the batch does not divide over the ranks; needs nothing heavy."""
    ranks = distributed.launched_ranks()
    if config.batch.size < ranks:
        raise RunError(f"{ranks} ranks share a batch of {config.batch.size} rows; start fewer ranks")
    if config.batch.size % ranks:
        raise RunError(f"batch.size {config.batch.size} does not divide over {ranks} ranks")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run gives: its folder, seconds of this part, and whether there was anything left to do."""

    folder: Path
    seconds: float
    already_complete: bool


def train(config: Config) -> Trained:
    """Run a recipe to its end, resuming if its folder holds a part of it.

    Raises:
        InputError: anything in the recipe, the data or the folder that cannot be used; nothing is overwritten.
    """
    folder = Path(config.output_dir)
    check_ranks(config)
    first = os.environ.get("RANK", "0") == "0"
    if (folder / RESULT).exists():
        claim_folder(config)
        return Trained(folder, 0.0, already_complete=True)
    datasets = load_datasets(config)
    plans = load_plans(config, datasets)
    distributed.start()
    build_sampler(config, datasets, plans)  # its checks come before the model is loaded
    if first:
        claim_folder(config)
    distributed.barrier()
    if not first:
        claim_folder(config)
    checkpoint = newest_checkpoint(folder)
    started = time.perf_counter()
    trainer = _build_trainer(config, datasets, plans, checkpoint)
    if first:
        rewind_metrics(folder, trainer.sampler.start)
        write_atomic(folder / "environment.json", json.dumps(environment(distributed.world_size()), indent=2) + "\n")
        print(describe(config, datasets, trainer.sampler, plans), flush=True)
    trainer.run(checkpoint)
    seconds = time.perf_counter() - started
    if first:
        _finish(config, trainer, datasets, plans, seconds)
    distributed.barrier()
    return Trained(folder, seconds, already_complete=False)


def _build_trainer(
    config: Config, datasets: list[PairDataset], plans: list[BatchPlan] | None, checkpoint: Path | None
) -> Any:
    from b3.train.checkpoint import checkpoint_step
    from b3.train.collate import StepCollator
    from b3.train.teacher import open_teachers
    from b3.train.trainer import ContrastiveTrainer

    start = 0 if checkpoint is None else checkpoint_step(checkpoint)
    sampler = build_sampler(config, datasets, plans, start)
    teachers = open_teachers(config, datasets)
    embedder = build_embedder(config)
    negatives = None
    if config.negatives.per_query:
        assert plans is not None
        mined = [plan.hard_negatives for plan in plans]
        assert all(rows is not None for rows in mined), "load_plans checks this"
        negatives = [rows[:, : config.negatives.per_query] for rows in mined if rows is not None]
    share, no_dropout = config.train.share_duplicates, config.model.train == "full" or config.adapter.dropout == 0
    collator = StepCollator(
        datasets,
        embedder.processor,
        config.train.chunk_tokens,
        negatives,
        share_duplicates=share == "always" or (share == "auto" and no_dropout),
        teachers=teachers,
    )
    return ContrastiveTrainer(embedder, config, collator, sampler)


def describe(
    config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, plans: list[BatchPlan] | None
) -> str:
    """What is about to happen, in a few lines."""
    size, h = config.batch.size, config.negatives.per_query
    lines = [f"{config.name}: {config.train.steps} steps of {size} pairs, policy {config.batch.policy}"]
    if plans and config.batch.policy == "b3":
        lines[0] += f" ({size // config.mining.k} communities of {config.mining.k})"
    for index, dataset in enumerate(datasets):
        count = f", {sampler.per_epoch_of[index]} batches an epoch" if len(sampler.per_epoch_of) > 1 else ""
        mined = f", {plans[index].report['mined_negatives_per_query']:.2f} mined negatives a query" if plans else ""
        lines.append(f"  {dataset.name}: {len(dataset):,} rows{count}{mined}")
    columns = size * (1 + h)
    lines.append(
        f"  {sampler.batches_per_epoch} batches an epoch, {columns - 1:,} negatives a query"
        + (f" ({h} hard negatives a row)" if h else "")
    )
    if sampler.start:
        lines.append(f"  continuing at step {sampler.start}")
    return "\n".join(lines)


def environment(world_size: int) -> dict[str, Any]:
    """Versions and hardware of a run."""
    from importlib.metadata import version

    import torch

    libraries = ("torch", "transformers", "peft", "accelerate", "numpy", "pillow")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "b3": __version__,
        "libraries": {name: version(name) for name in libraries},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "world_size": world_size,
    }


def _finish(
    config: Config, trainer: Any, datasets: list[PairDataset], plans: list[BatchPlan] | None, seconds: float
) -> None:
    """Write the final adapter, the model card, and last the file that says the run is complete."""
    from b3.train.card import model_card
    from b3.train.trainer import save_adapter

    folder = Path(config.output_dir)
    save_adapter(trainer.embedder, folder)
    metrics = read_metrics(folder)
    write_atomic(folder / "README.md", model_card(config, datasets, plans, metrics))
    result = {"steps": config.train.steps, "seconds": round(seconds, 2), "last": metrics[-1] if metrics else None}
    write_atomic(folder / RESULT, json.dumps(result, indent=2) + "\n")
