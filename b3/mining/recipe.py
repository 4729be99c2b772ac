"""Mining as a recipe describes it: teacher embeddings of every data set, a plan each, one report for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3 import distributed
from b3.config import BASE, Config, DatasetConfig
from b3.data.recipe import load_dataset
from b3.data.records import PairDataset
from b3.data.sources import embedded_teacher, split_source
from b3.errors import DataError, RunError
from b3.mining.plan import BatchPlan
from b3.progress import bar

if TYPE_CHECKING:
    from b3.mining.checks import Parameters
    from b3.mining.stages import Stages
    from b3.model.embedder import Embedder

Progress = Callable[[str, int, int], None]


def plan_name(subset: str, variant: str = BASE) -> str:
    """The folder of a plan in mining.dir: SUBSET, or SUBSET@NAME for a variant."""
    return subset if variant == BASE else f"{subset}@{variant}"


def plan_folder(config: Config, subset: str, variant: str = BASE) -> Path:
    return Path(config.mining.dir) / plan_name(subset, variant)


def wanted(config: Config, entry: DatasetConfig, dataset: PairDataset, variant: str = BASE) -> dict[str, Any]:
    """The manifest entries that a plan of this data set must have; hard negatives come from the base plan alone."""
    mining = config.mining_of(variant)
    return {
        "data_fingerprint": dataset.fingerprint(),
        "teacher": teacher_name(config),
        "p": mining.p_of(entry),
        "m": entry.m or mining.m,
        "K": mining.k,
        "h": config.negatives.per_query if variant == BASE else 0,
        "edges": mining.edges,
        "veto": mining.veto,
        "penalty": mining.penalty,
        "max_similarity": mining.max_similarity,
        "max_relative": mining.max_relative,
        "partitioner": mining.partitioner,
        "refine_passes": mining.refine_passes if mining.refined else 0,
        "piece_rows": mining.piece_rows,
        "search": mining.search,
        "seed": config.seed,
    }


def teacher_name(config: Config) -> str:
    mining = config.mining
    return mining.teacher if mining.teacher_adapter is None else f"{mining.teacher} + {mining.teacher_adapter}"


def load_plan(config: Config, entry: DatasetConfig, dataset: PairDataset, variant: str = BASE) -> BatchPlan:
    """The plan of a data set. Raises `RunError` if it is missing or was mined with other data or parameters."""
    folder = plan_folder(config, entry.subset, variant)
    if not (folder / "manifest.json").exists():
        raise RunError(f"no batch plan in {folder}; mine it first: python scripts/mine.py CONFIG.yaml")
    plan = BatchPlan.load(folder)
    for key, value in wanted(config, entry, dataset, variant).items():
        found = plan.manifest.get(key)
        if key == "h" and (found or 0) >= value:
            continue  # fewer hard negatives than were mined are a prefix of them
        if found != value:
            raise RunError(
                f"the batch plan in {folder} does not fit the recipe ({key} is {found!r}, the recipe says {value!r});"
                " correct the recipe, or mine again into another mining.dir"
            )
    return plan


def teacher_embeddings(
    config: Config, entry: DatasetConfig, dataset: PairDataset, teacher: Embedder | None
) -> tuple[np.ndarray, np.ndarray]:
    """(queries, targets), each (N, D), of the recipe's teacher for one data set."""
    if teacher is not None:
        queries = teacher.encode([dataset.query(i) for i in range(len(dataset))], progress=f"{dataset.name} queries")
        targets = teacher.encode([dataset.target(i) for i in range(len(dataset))], progress=f"{dataset.name} targets")
        return queries, targets
    if config.mining.teacher == "embedded":
        kind, name = split_source(entry.source or config.data.source)
        if kind != "embedded":
            raise DataError(
                f"mining.teacher 'embedded' needs embedded data, but {entry.subset} comes from {kind}:{name}"
            )
        queries, targets = embedded_teacher(name, entry.subset)
    else:
        folder = Path(config.mining.teacher)
        queries, targets = (load_matrix(folder / f"{entry.subset}_{side}.npy") for side in ("queries", "targets"))
    if entry.max_rows is not None:
        queries, targets = queries[: entry.max_rows], targets[: entry.max_rows]
    for side, array in (("queries", queries), ("targets", targets)):
        if len(array) != len(dataset):
            raise DataError(f"teacher {side} of {entry.subset} have {len(array)} rows, the data set {len(dataset)}")
    return queries, targets


def load_matrix(file: Path) -> np.ndarray:
    """A (N, D) array of floats, memory-mapped. Raises `DataError` naming the file and what is wrong with it."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist; write the teacher's embeddings there as a (N, D) .npy file") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file} is not a readable .npy file ({str(error).splitlines()[0]})") from None
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(f"{file} has shape {array.shape} and type {array.dtype}; expected floats of shape (N, D)")
    return array


def _load_teacher(config: Config) -> Embedder | None:
    """The teacher model, or None when its embeddings are given as arrays."""
    mining = config.mining
    folder = Path(mining.teacher)
    if mining.teacher == "embedded" or (
        folder.is_dir() and not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists()
    ):
        if mining.teacher_adapter is not None:
            raise RunError("mining.teacher_adapter needs mining.teacher to be a checkpoint")
        return None
    from b3.model.embedder import Embedder

    return Embedder.from_pretrained(
        mining.teacher,
        adapter=mining.teacher_adapter,
        dtype=config.model.dtype,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
    )


@contextmanager
def stage_bar(label: str, show: bool) -> Iterator[Progress]:
    """A progress callback for `mine`: one bar, relabelled at each stage."""
    with bar(1, label if show else None, "row") as shown:

        def update(stage: str, done: int, total: int) -> None:
            shown.set_description_str(f"{label}: {stage}", refresh=False)
            shown.total, shown.n = total, 0
            shown.update(done)

        yield update


@dataclass(frozen=True)
class _Job:
    """A plan to be mined."""

    entry: DatasetConfig
    dataset: PairDataset
    variant: str

    @property
    def name(self) -> str:
        return plan_name(self.entry.subset, self.variant)


def mine_recipe(config: Config, show_progress: bool = False) -> dict[str, BatchPlan]:
    """Mine every data set of a recipe that has no plan yet; returns all plans by subset, variants by SUBSET@NAME.

    Plans are saved one by one, and within a plan the teacher's embeddings and the ranks, so that an interrupted run
    continues after the last finished stage. `mining.dir`/report.html shows all plans.

    Under torchrun, all ranks share encoding and ranking; communities are found for as many plans at a time as there
    are ranks, one on each. The plans are the same for any number of ranks.

    Raises `InputError` for data or embeddings that cannot be used and for an existing plan that does not fit.
    """
    from b3.mining.report_html import Section, write_report_html

    variants = config.mined_plans or [BASE]  # who mines for random batches wants to see the base plan
    datasets = [load_dataset(config, entry) for entry in config.data.datasets]
    jobs = [_Job(*pair, variant) for pair in zip(config.data.datasets, datasets, strict=True) for variant in variants]
    missing = [
        job for job in jobs if not (plan_folder(config, job.entry.subset, job.variant) / "manifest.json").exists()
    ]
    for job in jobs:
        if job not in missing:
            load_plan(config, job.entry, job.dataset, job.variant)  # refuses one that does not fit, before work starts
    distributed.barrier()  # all have looked before the first plan appears
    if missing:
        _mine_plans(config, missing, show_progress and distributed.rank() == 0)
    plans = {job.name: load_plan(config, job.entry, job.dataset, job.variant) for job in jobs}
    page = Path(config.mining.dir) / "report.html"
    if distributed.rank() == 0 and (missing or not page.exists()):
        write_report_html(page, [Section(plans[job.name], job.dataset, name=job.name) for job in jobs])
    distributed.barrier()
    return plans


def _mine_plans(config: Config, jobs: list[_Job], show_progress: bool) -> None:
    """Mine and save plans, as many at a time as there are ranks: all rank each, then rank i cuts the i-th."""
    from b3.mining.mine import plan_pairs, rank_pairs
    from b3.mining.stages import Clock, Stages

    teacher = _load_teacher(config)
    world = distributed.world_size()
    last: tuple[PairDataset, tuple[np.ndarray, np.ndarray]] | None = None
    for start in range(0, len(jobs), world):
        mine_next = None
        for owner, job in enumerate(jobs[start : start + world]):
            if last is None or last[0] is not job.dataset:  # variants share the embeddings
                last = job.dataset, teacher_embeddings(config, job.entry, job.dataset, teacher)
            facts = wanted(config, job.entry, job.dataset, job.variant)
            stages = Stages(Path(config.mining.dir) / f".{job.name}.stages")
            chosen = _parameters(facts, len(job.dataset))
            with stage_bar(job.name, show_progress) as progress:
                ranked = rank_pairs(
                    *last[1], chosen, Clock(progress), stages=stages, owner=owner if world > 1 else None
                )
                if ranked is not None and world == 1:
                    _save(config, job, plan_pairs(ranked, chosen, facts["data_fingerprint"], facts["teacher"]), stages)
                elif ranked is not None:
                    mine_next = job, ranked, chosen, facts, stages
        if mine_next is not None:
            job, ranked, chosen, facts, stages = mine_next
            ranked.clock.progress = None
            _save(config, job, plan_pairs(ranked, chosen, facts["data_fingerprint"], facts["teacher"]), stages)
    distributed.barrier()


def _parameters(facts: dict[str, Any], count: int) -> Parameters:
    """The parameters of mining from the manifest entries that a plan must have."""
    from b3.mining.mine import parameters

    names = ("edges", "veto", "penalty", "partitioner", "refine_passes", "piece_rows", "max_similarity", "max_relative")
    given = {name: facts[name] for name in (*names, "search")}
    return parameters(count, facts["p"], facts["m"], facts["K"], facts["h"], facts["seed"], **given)


def _save(config: Config, job: _Job, plan: BatchPlan, stages: Stages) -> None:
    plan.save(plan_folder(config, job.entry.subset, job.variant))
    stages.remove()
