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
from b3.config import BASE, Config
from b3.data.recipe import load_datasets
from b3.errors import RunError
from b3.files import write_atomic
from b3.train.checkpoint import RESULT, checkpoint_facts, newest_checkpoint, rewind_metrics
from b3.train.claim import claim_folder, data_facts
from b3.train.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from b3.data.records import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.model.embedder import Embedder
    from b3.train.negatives import StepNegatives
    from b3.train.sampler import BatchPlanSampler

    Plans = dict[str, list[BatchPlan]]  # of each data set, by the name of the plan


def load_plans(config: Config, datasets: list[PairDataset]) -> Plans:
    """The mined plans that training reads, of each data set, checked against its rows; empty if it reads none.

    Raises `RunError` naming the command that mines.
    """
    from b3.mining.recipe import load_plan

    return {
        name: [
            load_plan(config, entry, dataset, name)
            for entry, dataset in zip(config.data.datasets, datasets, strict=True)
        ]
        for name in config.mined_plans
    }


def build_sampler(config: Config, datasets: list[PairDataset], plans: Plans, start: int = 0) -> BatchPlanSampler:
    """Batches of this rank under the recipe's policy."""
    from b3.train.sampler import BatchPlanSampler, random_rows

    batch, entries = config.batch, config.data.datasets
    sizes = [len(dataset) for dataset in datasets]
    communities: dict[str, list[Any]]
    if batch.mined:
        communities = {name: [*plans[name]] for name in config.batch_plans}
    else:
        communities = {BASE: [random_rows(size) for size in sizes]}
    return BatchPlanSampler(
        communities,
        batch.size,
        sizes=sizes,
        names=[dataset.name for dataset in datasets],
        seed=config.seed,
        steps=config.train.steps,
        start=start,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        weights=[entry.weight for entry in entries],
        pools=pool_numbers(config),
        random_share=batch.random_share,
        frozen=batch.remix == "frozen",
        schedule=config.phases(),
        negatives=_step_negatives(config, sizes, plans),
    )


def _step_negatives(config: Config, sizes: list[int], plans: Plans) -> StepNegatives | None:
    """The draw of hard negatives by batch, or None where they are drawn by community or there are none."""
    if not config.negatives.per_query or config.negatives.scope == "community":
        return None
    import numpy as np

    from b3.train.negatives import StepNegatives

    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return StepNegatives(plans[BASE], offsets, config.negatives.per_query, config.seed)


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
        pooling=model.pooling,
    )
    if embedder.vision is None:
        _check_text_only(config)
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


def _check_text_only(config: Config) -> None:
    """Raise `RunError` for a key that a text encoder has no use for (beside those that loading refuses)."""
    name = config.model.name
    if "vision_cache_mib" in config.train.changed():
        raise RunError(f"train.vision_cache_mib has no effect with the text encoder {name}; leave it out")
    if config.model.shard:
        raise RunError(f"model.shard spreads decoder layers, and {name} is a text encoder; leave it out")


def _attach(embedder: Embedder, config: Config) -> None:
    from transformers import set_seed

    from b3.model.adapter import AdapterSpec, attach_adapter, load_trainable
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
            embedder.adapter_targets if targets is None else targets if isinstance(targets, str) else tuple(targets),
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
    """What a run gives: its folder, seconds of this part, and whether nothing was left to do or a signal ended it."""

    folder: Path
    seconds: float
    already_complete: bool = False
    stopped: bool = False


def train(config: Config) -> Trained:
    """Run a recipe to its end, resuming if its folder holds a part of it.

    SIGTERM and SIGUSR1 end it after the step it is in, with a checkpoint (`Trained.stopped`).

    Raises:
        InputError: anything in the recipe, the data or the folder that cannot be used; nothing is overwritten.
    """
    folder = Path(config.output_dir)
    config = follow_launcher(config)
    check_ranks(config)
    check_machine(config)
    if (folder / RESULT).exists() and _steps_done(folder) >= config.train.steps:
        claim_folder(config)
        return Trained(folder, 0.0, already_complete=True)
    with StopRequest() as request:
        datasets = load_datasets(config)
        plans = load_plans(config, datasets)
        distributed.start(config.train.timeout_minutes)
        build_sampler(config, datasets, plans)  # its checks come before the model is loaded
        checkpoint, notes = _claim(config, datasets, plans)
        started = time.perf_counter()
        trainer = _build_trainer(config, datasets, plans, checkpoint, request)
        if distributed.rank() == 0:
            _announce(config, trainer, datasets, plans, notes)
        try:
            finished = trainer.run(checkpoint)
        except Stopped:
            finished = False
        seconds = time.perf_counter() - started
        if finished and distributed.rank() == 0:
            from b3.train.finish import finish

            finish(config, trainer, datasets, plans, seconds)
        distributed.barrier()
    return Trained(folder, seconds, stopped=not finished)


def _steps_done(folder: Path) -> int:
    try:
        return int(json.loads((folder / RESULT).read_text())["steps"])
    except (ValueError, KeyError):
        return 0


def _claim(config: Config, datasets: list[PairDataset], plans: Plans) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from and what to say about it; decided by the first rank for all."""
    found: tuple[str | None, list[str], str | None] = (None, [], None)
    if distributed.rank() == 0:
        try:
            notes = claim_folder(config, data_facts(datasets, plans))
            newest = newest_checkpoint(Path(config.output_dir))
            if newest is not None:
                before, now = checkpoint_facts(newest)["world_size"], distributed.world_size()
                if before != now:
                    notes.append(
                        f"{now} ranks where {before} were: the same batches, losses equal up to rounding"
                        + ("; dropout is drawn anew" if config.adapter.dropout else "")
                    )
            (Path(config.output_dir) / RESULT).unlink(missing_ok=True)  # of a run that is now to be longer
            found = (None if newest is None else str(newest), notes, None)
        except RunError as error:
            found = (None, [], str(error))
    checkpoint, notes, problem = distributed.gather_objects(found)[0]
    if problem is not None:
        raise RunError(problem)
    return (None if checkpoint is None else Path(checkpoint)), notes


def _announce(config: Config, trainer: Any, datasets: list[PairDataset], plans: Plans, notes: list[str]) -> None:
    """Write environment.json, cut the log to where training starts, and print what will happen."""
    from b3.train.estimate import estimate

    folder = Path(config.output_dir)
    rewind_metrics(folder, trainer.sampler.start)
    trainer.bad_rows.rewind()
    write_atomic(folder / "environment.json", json.dumps(environment(distributed.world_size()), indent=2) + "\n")
    lines = [describe(config, datasets, trainer.sampler, plans)]
    lines += estimate(config, datasets, trainer.sampler, trainer.embedder).lines()
    lines += [f"  note: {note}" for note in notes]
    print("\n".join(lines), flush=True)


def check_machine(config: Config) -> None:
    """Raise `RunError` if the recipe asks for what this machine or installation does not have."""
    from importlib.util import find_spec

    for name in config.train.trackers:
        if find_spec(name) is None:
            raise RunError(f"train.trackers: {name} is not installed; pip install 'b3[trackers]', or leave it out")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise RunError(
            "DeepSpeed is not supported: its engine owns backward and step, and the cached step does both in parts."
            " Start with torchrun; model.shard=true spreads the frozen weights over the ranks as ZeRO-3 would"
        )
    if config.train.bf16 or config.model.dtype == "bfloat16":
        import torch

        if not torch.cuda.is_available():
            asked = "train.bf16 true" if config.train.bf16 else "model.dtype bfloat16"
            raise RunError(
                f"{asked} needs a GPU and none is visible; check the driver and CUDA_VISIBLE_DEVICES, or set"
                " train.bf16=false model.dtype=float32"
            )
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise RunError(
                f"{torch.cuda.get_device_name(0)} does not compute in bfloat16; set train.bf16=false"
                " model.dtype=float32"
            )


def follow_launcher(config: Config) -> Config:
    """The recipe with `model.shard` set if accelerate was told to use FSDP, whose own wrapping is then left out.

    Its wrapper would average the gradients of every chunk over the ranks; see `b3.train.shard` for what is done.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return config
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RunError("accelerate asks for FSDP 1, which is not supported; take configs/accelerate/fsdp2.yaml")
    del os.environ["ACCELERATE_USE_FSDP"]
    return config.model_copy(update={"model": config.model.model_copy(update={"shard": True})})


def _build_trainer(
    config: Config,
    datasets: list[PairDataset],
    plans: Plans,
    checkpoint: Path | None,
    request: StopRequest,
) -> Any:
    from b3.train.checkpoint import checkpoint_step
    from b3.train.collate import StepCollator
    from b3.train.evaluation import Evaluator
    from b3.train.teacher import open_teachers
    from b3.train.trainer import ContrastiveTrainer

    start = 0 if checkpoint is None else checkpoint_step(checkpoint)
    sampler = build_sampler(config, datasets, plans, start)
    teachers = open_teachers(config, datasets)
    embedder = build_embedder(config)
    if config.model.shard:
        from b3.train.shard import shard_frozen

        shard_frozen(embedder)
    negatives = None
    if config.negatives.per_query and config.negatives.scope == "community":
        mined = [plan.hard_negatives for plan in plans[BASE]]
        assert all(rows is not None for rows in mined), "load_plans checks this"
        negatives = [rows[:, : config.negatives.per_query] for rows in mined if rows is not None]
    share = config.train.share_duplicates
    collator = StepCollator(
        datasets,
        embedder.processor,
        config.train.chunk_tokens,
        negatives,
        share_duplicates=share == "always" or (share == "auto" and not embedder.has_dropout),
        teachers=teachers,
    )
    evaluator = Evaluator(config, embedder) if config.eval and config.eval.every else None
    return ContrastiveTrainer(embedder, config, collator, sampler, request, evaluator)


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
