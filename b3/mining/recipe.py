"""Mining as a recipe describes it: teacher embeddings of every data set, a plan each, one report for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b3 import distributed
from b3.config import Config, DatasetConfig
from b3.config.checks import check
from b3.config.schema import MiningOptions
from b3.console import Progress, bar
from b3.data.datasets import PairDataset, load_dataset
from b3.errors import RunError
from b3.files import Stages, belongs_elsewhere, changes, write_array
from b3.mining.mine import mine, rank_together
from b3.mining.plan import BatchPlan
from b3.mining.teacher import forget_teacher, load_teacher, teacher_embeddings, teacher_name


def plan_folder(config: Config, subset: str) -> Path:
    return Path(config.mining.dir) / subset


def options_for(config: Config, entry: DatasetConfig) -> MiningOptions:
    """What `mine` takes for a data set of the recipe."""
    return config.mining.options_for(entry, config.negatives.mined)


def load_plan(config: Config, entry: DatasetConfig, dataset: PairDataset) -> BatchPlan:
    """The plan of a data set. Raises `RunError` if it is missing or was mined with other data or parameters."""
    folder = plan_folder(config, entry.subset)
    if not (folder / "manifest.json").exists():
        raise RunError(f"no batch plan in {folder}; mine it first: python scripts/mine.py CONFIG.yaml")
    plan = BatchPlan.load(folder)
    options = options_for(config, entry)
    facts = {"data_fingerprint": dataset.fingerprint(), "teacher": teacher_name(config), **options.model_dump()}
    if plan.manifest.get("imported") is not None:  # mined elsewhere, with parameters that the files do not tell
        facts = {key: facts[key] for key in ("data_fingerprint", "community_size", "hard_negatives")}
    differing = changes(plan.manifest, facts)
    if (plan.manifest.get("hard_negatives") or 0) >= options.hard_negatives:
        differing.pop("hard_negatives", None)  # fewer than were mined are a prefix of them
    if options.by_label:  # the manifest has the p and m that followed from the number of labels
        differing = {key: text for key, text in differing.items() if key not in ("p", "m")}
    if differing:
        remedy = "correct the recipe, or mine again into another mining.dir"
        raise belongs_elsewhere(folder, "batch plan", differing.values(), remedy)
    return plan


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


def mine_recipe(config: Config, show_progress: bool = False) -> dict[str, BatchPlan]:
    """Mine every data set of a recipe that has no plan yet; returns all plans by subset.

    Plans are saved one by one, and within a plan the teacher's embeddings and the rankings, so that an interrupted run
    continues after the last finished stage. `mining.dir`/report.html shows all plans.

    Under torchrun, all processes share encoding and ranking; communities are found for as many plans at a time as there
    are processes, one on each. The plans are the same for any number of them.

    Raises `InputError` for data or embeddings that cannot be used and for an existing plan that does not fit.
    """
    from b3.mining.page import Section, write_page

    check(config)
    jobs = [_Job(entry, load_dataset(config, entry)) for entry in config.data.datasets]
    missing = [job for job in jobs if not (plan_folder(config, job.entry.subset) / "manifest.json").exists()]
    for job in jobs:
        if job not in missing:
            load_plan(config, job.entry, job.dataset)  # refuses one that does not fit, before work starts
    distributed.barrier()  # all have looked before the first plan appears
    if missing:
        _mine_plans(config, missing, show_progress and distributed.rank() == 0)
    plans = {job.entry.subset: load_plan(config, job.entry, job.dataset) for job in jobs}
    page = Path(config.mining.dir) / "report.html"
    measured = [(name, job) for name, job in zip(plans, jobs, strict=True) if plans[name].measured]
    sections = [Section(plans[name].report, plans[name].manifest, job.dataset, name) for name, job in measured]
    if distributed.rank() == 0 and sections and (missing or not page.exists()):
        write_page(page, sections)
    distributed.barrier()
    return plans


def _mine_plans(config: Config, jobs: list[_Job], show_progress: bool) -> None:
    """Mine and save plans, as many at a time as there are processes: all rank each, then process i cuts the i-th."""
    teacher = load_teacher(config)
    world = distributed.world_size()
    for start in range(0, len(jobs), world):
        own_job: tuple[_Job, np.ndarray, np.ndarray] | None = None  # with (N, D) queries and targets
        for owner, job in enumerate(jobs[start : start + world]):
            queries, targets = teacher_embeddings(config, job.entry, job.dataset, teacher)
            if owner == distributed.rank():
                own_job = job, _on_disk(config, job, "queries", queries), _on_disk(config, job, "targets", targets)
            if world > 1:
                with stage_bar(job.entry.subset, show_progress) as progress:
                    options = options_for(config, job.entry)
                    rank_together(queries, targets, options, _stages(config, job), owner, progress)
        if own_job is not None:
            _mine_plan(config, *own_job, show_progress and world == 1)
    distributed.barrier()
    forget_teacher(config)


def _on_disk(config: Config, job: _Job, side: str, vectors: np.ndarray) -> np.ndarray:
    """(N, D) vectors mapped from a file beside the stages, so that the next data set has the memory to itself."""
    if distributed.world_size() == 1 or isinstance(vectors, np.memmap):
        return vectors
    file = _stages(config, job).folder / f"{side}.npy"
    write_array(file, vectors)
    mapped: np.ndarray = np.load(file, mmap_mode="r")
    return mapped


def _stages(config: Config, job: _Job) -> Stages:
    return Stages(Path(config.mining.dir) / f".{job.entry.subset}.stages")


def _mine_plan(config: Config, job: _Job, queries: np.ndarray, targets: np.ndarray, show_progress: bool) -> None:
    stages = _stages(config, job)
    with stage_bar(job.entry.subset, show_progress) as progress:
        plan = mine(
            queries,
            targets,
            **options_for(config, job.entry).model_dump(),
            data_fingerprint=job.dataset.fingerprint(),
            teacher=teacher_name(config),
            compare=config.report.compare,
            progress=progress,
            stages=stages,
        )
    plan.save(plan_folder(config, job.entry.subset))
    stages.remove()
