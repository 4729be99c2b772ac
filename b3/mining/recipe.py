"""Mining as a recipe describes it: teacher embeddings of every data set, a plan each, one report for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from b3 import distributed
from b3.config import Config, DatasetConfig
from b3.config.checks import check
from b3.console import Progress, bar
from b3.data.datasets import PairDataset, load_dataset
from b3.errors import RunError
from b3.files import Stages, belongs_elsewhere, changes, tidy, wait_for, write_array, write_text
from b3.locks import alone
from b3.mining.mine import mine, rank_together
from b3.mining.plan import BatchPlan
from b3.mining.teacher import (
    SIDES,
    forget_teacher,
    is_teacher_kept,
    keeps_vectors,
    load_teacher,
    missing_vectors,
    store_vectors,
    teacher_embeddings,
    teacher_key,
    teacher_name,
)

KEPT_BYTES = 1 << 26  # of a teacher's vectors that stay in memory
Job = tuple[DatasetConfig, PairDataset]  # a plan to be mined


def load_plan(config: Config, entry: DatasetConfig, dataset: PairDataset) -> BatchPlan:
    """The plan of a data set. Raises `RunError` if it is missing or was mined with other data or parameters."""
    folder = Path(config.mining.dir) / entry.subset
    if not (folder / "manifest.json").exists():
        raise RunError(f"no batch plan in {folder}; mine it first: python scripts/mine.py CONFIG.yaml")
    plan = BatchPlan.load(folder)
    options = config.mining.options_for(entry, config.negatives.mined)
    facts = {"data_fingerprint": dataset.fingerprint(), "teacher": teacher_name(config), **options.model_dump()}
    if plan.manifest.get("teacher_key") and (key := teacher_key(config, entry)):
        facts["teacher_key"] = key
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


def mine_recipe(config: Config, show_progress: bool = False) -> dict[str, BatchPlan]:
    """Mine every data set of a recipe that has no plan yet; returns all plans by subset.

    Plans are saved one by one, and within a plan the teacher's embeddings and the rankings, so that an interrupted run
    continues after the last finished stage. `mining.dir`/report.html shows all plans. If training reads what a teacher
    model encodes, its vectors stay in `mining.dir`, also for plans that are there already.

    Under torchrun, all processes share encoding and ranking; communities are found for as many plans at a time as there
    are processes, one on each. The plans are the same for any number of them.

    Raises `InputError` for data or embeddings that cannot be used and for an existing plan that does not fit.
    """
    from b3.mining.page import Section, render

    check(config)
    jobs = [(entry, load_dataset(config, entry)) for entry in config.data.datasets]
    is_there = []
    for entry, dataset in jobs:
        is_there.append((Path(config.mining.dir) / entry.subset / "manifest.json").exists())
        if is_there[-1]:
            load_plan(config, entry, dataset)  # refuses one that does not fit, before work starts
    fingerprints = {dataset.name: dataset.fingerprint() for _, dataset in jobs}
    distributed.agree("data", fingerprints, "give every machine the same rows")
    is_there = distributed.gather_objects(is_there)[0]  # other machines may not see a new file yet
    missing = [job for job, there in zip(jobs, is_there, strict=True) if not there]
    finished = [_stages(config, entry) for (entry, _), there in zip(jobs, is_there, strict=True) if there]
    is_left = is_teacher_kept(config) or any(stages.folder.exists() for stages in finished)
    vectors = missing_vectors(config, jobs) if keeps_vectors(config) else []
    with ExitStack() as held:
        if distributed.rank() == 0 and (missing or vectors or is_left):
            held.enter_context(alone(Path(config.mining.dir), "call of mining", "choose another mining.dir"))
            tidy(Path(config.mining.dir))
            for stages in finished:  # left by a call that was killed, or whose deletion a power failure undid
                stages.remove()
        if vectors:
            store_vectors(config, vectors)
        if missing:
            _mine_plans(config, missing, show_progress and distributed.rank() == 0)
        forget_teacher(config)  # also what a call has left that was killed after its last plan
    for entry, _ in jobs:
        wait_for(Path(config.mining.dir) / entry.subset / "manifest.json")
    plans = {entry.subset: load_plan(config, entry, dataset) for entry, dataset in jobs}
    page = Path(config.mining.dir) / "report.html"
    sections = [
        Section(plan.report, plan.manifest, dataset, name)
        for (name, plan), (_, dataset) in zip(plans.items(), jobs, strict=True)
        if plan.measured
    ]
    if distributed.rank() == 0 and sections and (missing or not page.exists()):
        write_text(page, render(sections))
    distributed.barrier()
    return plans


def _mine_plans(config: Config, jobs: list[Job], show_progress: bool) -> None:
    """Mine and save plans, as many at a time as there are processes: all rank each, then process i cuts the i-th."""
    teacher = None if keeps_vectors(config) else load_teacher(config)
    world = distributed.world_size()
    for start in range(0, len(jobs), world):
        arrays: tuple[np.ndarray, np.ndarray] | None = None  # (N, D) queries and targets of the plan to cut here
        for owner, (entry, dataset) in enumerate(jobs[start : start + world]):
            queries, targets = teacher_embeddings(config, entry, dataset, teacher)
            if owner == distributed.rank():
                queries, targets = (
                    _on_disk(config, entry, side, array) for side, array in zip(SIDES, (queries, targets), strict=True)
                )
                arrays = queries, targets
            if world > 1:
                options = config.mining.options_for(entry, config.negatives.mined)
                with stage_bar(entry.subset, show_progress) as progress:
                    rank_together(queries, targets, options, _stages(config, entry), owner, progress)
        if arrays is not None:
            _mine_plan(config, *jobs[start + distributed.rank()], *arrays, show_progress and world == 1)
    distributed.barrier()


def _on_disk(config: Config, entry: DatasetConfig, side: str, vectors: np.ndarray) -> np.ndarray:
    """(N, D) vectors mapped from a file beside the stages: mining holds unit vectors, and needs these only once."""
    if isinstance(vectors, np.memmap) or vectors.nbytes < KEPT_BYTES:
        return vectors
    file = _stages(config, entry).folder / f"{side}.npy"
    write_array(file, vectors)
    mapped: np.ndarray = np.load(file, mmap_mode="r")
    return mapped


def _mine_plan(
    config: Config,
    entry: DatasetConfig,
    dataset: PairDataset,
    queries: np.ndarray,
    targets: np.ndarray,
    show_progress: bool,
) -> None:
    stages = _stages(config, entry)
    with stage_bar(entry.subset, show_progress) as progress:
        plan = mine(
            queries,
            targets,
            **config.mining.options_for(entry, config.negatives.mined).model_dump(),
            data_fingerprint=dataset.fingerprint(),
            teacher=teacher_name(config),
            compare=config.report.compare,
            progress=progress,
            stages=stages,
        )
    plan.manifest["teacher_key"] = teacher_key(config, entry)
    plan.save(Path(config.mining.dir) / entry.subset)
    stages.remove()


def _stages(config: Config, entry: DatasetConfig) -> Stages:
    return Stages(Path(config.mining.dir) / f".{entry.subset}.stages")
