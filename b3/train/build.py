"""From a recipe to the model that is trained and to the trainer around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3 import distributed, registry
from b3.config import Config
from b3.errors import RunError
from b3.train.stop import StopRequest

if TYPE_CHECKING:
    import numpy as np

    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.model.embedder import Embedder
    from b3.train.loop import Trainer
    from b3.train.losses.loss import Loss
    from b3.train.losses.matryoshka import Matryoshka
    from b3.train.sampler import BatchPlanSampler


def check_stored_negatives(config: Config, datasets: list[PairDataset]) -> None:
    """Raise `RunError` naming a data set whose rows bring no negatives along although the recipe trains with them.

    And one with a closed set of options some of which would be left out.
    """
    for entry, dataset in zip(config.data.datasets, datasets, strict=True):
        if config.negatives.source == "data" and not dataset.has_negatives:
            raise RunError(
                f"negatives.source data: {dataset.name} has no columns neg_text and neg_image_path; add them, or mine"
                " hard negatives with negatives.source mined"
            )
        if entry.closed:
            counts = [len(dataset.negatives(row)) for row in range(len(dataset))]
            most, least = (
                max(range(len(counts)), key=counts.__getitem__),
                min(range(len(counts)), key=counts.__getitem__),
            )
            if counts[most] > config.negatives.per_query:
                raise RunError(
                    f"{dataset.name} is closed and its {dataset.where(most)} brings {counts[most]} other options;"
                    f" raise negatives.per_query, which is {config.negatives.per_query}"
                )
            if not counts[least]:
                raise RunError(
                    f"{dataset.name} is closed and its {dataset.where(least)} brings no other option, so that it would"
                    " teach nothing; drop the row"
                )


def load_plans(config: Config, datasets: list[PairDataset]) -> list[BatchPlan]:
    """The mined plan of each data set, checked against its rows; empty if the run reads none.

    Raises `RunError` naming the command that mines.
    """
    from b3.mining.recipe import load_plan

    if not config.needs_plan:
        return []
    return [load_plan(config, *pair) for pair in zip(config.data.datasets, datasets, strict=True)]


def build_embedder(config: Config) -> Embedder:
    """The backbone with a fresh (or continued) trainable adapter, or with all its weights trainable."""
    import torch

    from b3.model.adapter import check_backbone
    from b3.model.checkpoint import fetch, freeze_matching, unfreeze_all
    from b3.model.compiled import compile_layers
    from b3.model.embedder import Embedder, locate
    from b3.model.settings import read_settings

    model = config.model
    adapter = None if model.init_adapter is None else fetch(model.init_adapter)
    if adapter is not None:
        check_backbone(adapter, locate(model.name)[0])
    if model.train == "full" and model.dtype == "bfloat16" and distributed.is_first():
        print("note: model.train full keeps its weights in float32; model.dtype bfloat16 changes nothing")
    embedder = Embedder.from_pretrained(
        model.name,
        dtype="float32" if model.train == "full" else model.dtype,
        attention=model.attention,
        **{**read_settings(adapter), **model.settings()},
    )
    if model.shard and not embedder.layers():
        raise RunError(
            f"model.shard spreads decoder layers, and {model.name} has none: every rank would hold all; leave it out"
        )
    if model.quantize:
        from b3.model.quantize import quantize_layers

        quantize_layers(embedder, torch.bfloat16 if config.train.bf16 else embedder.dtype)
        if distributed.is_first():
            print(
                "note: model.quantize rounds the frozen weights of this run; its checkpoints hold the adapter, which"
                f" loads on the whole weights of {model.name}"
            )
    if model.train == "full":
        unfreeze_all(embedder.backbone)
    else:
        _attach(embedder, config, adapter)
    if model.freeze:
        freeze_matching(embedder.backbone, model.freeze)
    if model.gradient_checkpointing:
        backbone: Any = embedder.backbone
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    choice = False if model.shard or model.quantize else model.compile
    embedder.execution = compile_layers(embedder.compiled_layers(), choice, embedder.device)
    return embedder


def _attach(embedder: Embedder, config: Config, adapter: Path | None) -> None:
    """Give the backbone a fresh trainable adapter, or one with the weights of the folder `adapter`."""
    from transformers import set_seed

    from b3.model.adapter import AdapterSpec, attach_adapter, load_trainable

    if not embedder.adapter_targets:
        raise RunError(f"{config.model.name} takes no adapter; set model.train=full")
    spec = config.adapter
    targets = embedder.adapter_targets if spec.target_modules is None else spec.target_modules
    targets = targets if isinstance(targets, str) else tuple(targets)
    set_seed(config.seed)  # the adapter's initial values
    embedder.backbone = attach_adapter(
        embedder.backbone, AdapterSpec(spec.r, spec.alpha, spec.dropout, spec.use_dora, spec.init, targets)
    )
    if adapter is not None:
        load_trainable(embedder.backbone, adapter)


def build_trainer(
    config: Config,
    datasets: list[PairDataset],
    plans: list[BatchPlan],
    sampler: BatchPlanSampler,
    request: StopRequest,
) -> Trainer:
    """The parts of a run around its model; `sampler` says at which step it starts."""
    from transformers import set_seed

    from b3.train.inputs import StepCollator
    from b3.train.loop import Evaluator, Trainer

    loss = registry.load("loss", config.train.loss).from_config(config)
    teachers = open_teachers(config, datasets) if loss.reads_teacher else None
    embedder = build_embedder(config)
    if config.train.lengths:
        loss = at_lengths(loss, config, embedder)
    if config.model.shard and distributed.world_size() > 1:
        from b3.train.shard import shard_frozen

        shard_frozen(embedder)
    h, share, hard_negatives = config.negatives.per_query, config.train.share_duplicates, None
    if config.negatives.mined:  # `load_plans` checks that every plan has so many
        hard_negatives = [plan.hard_negatives[:, :h] for plan in plans if plan.hard_negatives is not None]
    collator = StepCollator(
        datasets,
        embedder.processor,
        config.train.chunk_tokens,
        hard_negatives,
        h if config.negatives.source == "data" else 0,
        share_duplicates=share == "always" or (share == "auto" and not embedder.has_dropout),
        teachers=teachers,
        **facts_of_data(config, datasets),
    )
    set_seed(config.seed)
    evaluator = Evaluator(config, embedder) if config.eval and config.eval.every else None
    return Trainer(embedder, loss, config, collator, sampler, request, evaluator)


def facts_of_data(config: Config, datasets: list[PairDataset]) -> dict[str, Any]:
    """What a collator says of each row beside its items: temperature, options, other positives."""
    entries, temperature = config.data.datasets, config.train.temperature
    most = max(dataset.most_positives for dataset in datasets)
    return {
        "temperatures": [temperature[entry.family] for entry in entries] if isinstance(temperature, dict) else None,
        "closed": [entry.closed for entry in entries] if any(entry.closed for entry in entries) else None,
        "num_known": most if most > 1 else 0,
    }


def at_lengths(loss: Loss, config: Config, embedder: Embedder) -> Matryoshka:
    """The loss at each length of `train.matryoshka`. Raises `RunError` for one that the vectors do not have."""
    from b3.train.losses.matryoshka import Matryoshka

    longest = max(config.train.lengths)
    if longest > embedder.dim:
        raise RunError(
            f"train.matryoshka {longest} exceeds the {embedder.dim} numbers of a vector of {config.model.name};"
            " leave it out"
        )
    return Matryoshka(loss, config.train.lengths)


def open_teachers(config: Config, datasets: list[PairDataset]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(queries, targets), each (N, D) and memory-mapped, of every data set, for a loss that reads them.

    Raises:
        RunError: the recipe's teacher is a model, and mining has kept none of its vectors.
        DataError: a file is missing or does not fit its data set.
    """
    from b3.mining.teacher import teacher_embeddings
    from b3.train.sampler import pool_numbers

    pairs = zip(config.data.datasets, datasets, strict=True)
    teachers = [teacher_embeddings(config, entry, dataset, None) for entry, dataset in pairs]
    first_of: dict[int, int] = {}
    for number, pool in enumerate(pool_numbers(config)):
        one, other = first_of.setdefault(pool, number), number
        dims = [teachers[n][side].shape[1] for n in (one, other) for side in (0, 1)]
        if len(set(dims)) > 1:
            raise RunError(
                f"the teacher's vectors of {datasets[one].name} and {datasets[other].name}, which share batches, have"
                f" {' and '.join(map(str, sorted(set(dims))))} numbers; use one teacher"
            )
    return teachers
