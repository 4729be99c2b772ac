"""Mining as a recipe describes it: teacher embeddings of every data set, a plan each, one report for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b3 import distributed
from b3.config import Config, DatasetConfig
from b3.console import Clock, Progress, bar
from b3.data.datasets import PairDataset, load_dataset
from b3.errors import ConfigError, RunError
from b3.files import Stages, belongs_elsewhere, changes
from b3.mining.plan import BatchPlan
from b3.mining.teacher import forget_teacher, load_teacher, teacher_embeddings, teacher_name


def plan_folder(config: Config, subset: str) -> Path:
    return Path(config.mining.dir) / subset


def wanted(config: Config, entry: DatasetConfig, dataset: PairDataset) -> dict[str, Any]:
    """The manifest entries that a plan of this data set must have."""
    mining = config.mining
    labelled = entry.family == "classification"
    by_label = labelled and mining.target_unit == "label30"
    facts: dict[str, Any] = {
        "data_fingerprint": dataset.fingerprint(),
        "teacher": teacher_name(config),
        "target_unit": "label30" if by_label else "distinct",
        "subset_rows": mining.classification_subset if labelled else None,
        "p": 0 if by_label else mining.p_of(entry),
        "m": entry.m or mining.m,
        "K": mining.k,
        "h": config.negatives.mined,
        "edges": "mutual" if by_label else mining.edges,
        "veto": mining.veto,
        "partitioner": mining.partitioner,
        "refine_passes": mining.refine_passes if mining.refined else 0,
        "piece_rows": mining.piece_rows,
        "search": mining.search,
        "seed": config.seed,
    }
    if by_label and entry.m is None:
        del facts["m"]  # follows from the number of labels
    if facts["h"]:
        facts["negatives"] = config.negatives.rules
    return facts


def load_plan(config: Config, entry: DatasetConfig, dataset: PairDataset) -> BatchPlan:
    """The plan of a data set. Raises `RunError` if it is missing or was mined with other data or parameters."""
    folder = plan_folder(config, entry.subset)
    if not (folder / "manifest.json").exists():
        raise RunError(f"no batch plan in {folder}; mine it first: python scripts/mine.py CONFIG.yaml")
    plan = BatchPlan.load(folder)
    facts = wanted(config, entry, dataset)
    if plan.manifest.get("imported") is not None:  # mined elsewhere, with parameters that the files do not tell
        facts = {key: facts[key] for key in ("data_fingerprint", "K", "h")}
    differing = changes(plan.manifest, facts)
    if (plan.manifest.get("h") or 0) >= facts["h"]:
        differing.pop("h", None)  # fewer hard negatives than were mined are a prefix of them
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

    Plans are saved one by one, and within a plan the teacher's embeddings and the ranks, so that an interrupted run
    continues after the last finished stage. `mining.dir`/report.html shows all plans.

    Under torchrun, all ranks share encoding and ranking; communities are found for as many plans at a time as there
    are ranks, one on each. The plans are the same for any number of ranks.

    Raises `InputError` for data or embeddings that cannot be used and for an existing plan that does not fit.
    """
    from b3.mining.page import Section, write_page

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
    """Mine and save plans, as many at a time as there are ranks: all rank each, then rank i cuts the i-th."""
    teacher = load_teacher(config)
    world = distributed.world_size()
    for start in range(0, len(jobs), world):
        mine_next: Callable[[], None] | None = None
        for owner, job in enumerate(jobs[start : start + world]):
            embeddings = teacher_embeddings(config, job.entry, job.dataset, teacher)
            with stage_bar(job.entry.subset, show_progress) as progress:
                cut = _rank_job(config, job, embeddings, progress, owner if world > 1 else None)
                if cut is not None and world == 1:
                    cut()
                elif cut is not None:
                    mine_next = cut
        if mine_next is not None:
            mine_next()
    distributed.barrier()
    forget_teacher(config)


def _rank_job(
    config: Config,
    job: _Job,
    embeddings: tuple[np.ndarray, np.ndarray],
    progress: Progress,
    owner: int | None,
) -> Callable[[], None] | None:
    """Rank the pairs of a plan; returns what finds its communities and saves it, on the rank that is to do so."""
    from b3.mining.checks import check_rules
    from b3.mining.mine import parameters, plan_pairs, rank_pairs
    from b3.mining.negatives import NegativeRules

    facts = wanted(config, job.entry, job.dataset)
    same = (
        "edges", "veto", "partitioner", "refine_passes", "piece_rows",
        "search", "target_unit", "subset_rows",
    )  # fmt: skip
    given = {name: facts[name] for name in same}
    m = facts.get("m", config.mining.m)
    chosen = parameters(len(job.dataset), facts["p"], m, facts["K"], facts["h"], facts["seed"], **given)
    rules = check_rules(NegativeRules(**facts["negatives"]) if facts["h"] else None, facts["h"])
    stages = Stages(Path(config.mining.dir) / f".{job.entry.subset}.stages")
    ranked = rank_pairs(*embeddings, chosen, rules, Clock(progress), stages=stages, owner=owner)
    if ranked is None:
        return None
    if ranked.chosen.m != facts.get("m", ranked.chosen.m):
        raise ConfigError(
            f"m {facts['m']} of {job.entry.subset} has no effect with mining.target_unit label30, which takes"
            f" {ranked.chosen.m} labels (30 %); leave m out"
        )

    def cut() -> None:
        if owner is not None:
            ranked.clock.progress = None  # its bar is gone
        plan = plan_pairs(ranked, facts["data_fingerprint"], facts["teacher"])
        plan.save(plan_folder(config, job.entry.subset))
        stages.remove()

    return cut
