"""Mining as a recipe describes it: teacher embeddings of every data set, a plan each, one report for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from b3.config import BASE, Config, DatasetConfig
from b3.data.recipe import load_dataset
from b3.data.records import Item, PairDataset
from b3.data.sources import embedded_teacher, split_source
from b3.errors import ConfigError, DataError, RunError
from b3.mining.plan import BatchPlan
from b3.progress import bar

Progress = Callable[[str, int, int], None]
SENTENCE_TRANSFORMER = "st:"


class Teacher(Protocol):
    """A model that embeds items: an `Embedder`, or a `SentenceTransformerTeacher`."""

    def encode(self, items: list[Item], *, progress: str | None = None) -> np.ndarray: ...


def plan_name(subset: str, variant: str = BASE) -> str:
    """The folder of a plan in mining.dir: SUBSET, or SUBSET@NAME for a variant."""
    return subset if variant == BASE else f"{subset}@{variant}"


def plan_folder(config: Config, subset: str, variant: str = BASE) -> Path:
    return Path(config.mining.dir) / plan_name(subset, variant)


def wanted(config: Config, entry: DatasetConfig, dataset: PairDataset, variant: str = BASE) -> dict[str, Any]:
    """The manifest entries that a plan of this data set must have; hard negatives come from the base plan alone."""
    mining = config.mining_of(variant)
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
        "h": config.negatives.per_query if variant == BASE else 0,
        "edges": "mutual" if by_label else mining.edges,
        "veto": mining.veto,
        "partitioner": mining.partitioner,
        "refine_passes": mining.refine_passes if mining.partitioner == "metis" else 0,
        "seed": config.seed,
    }
    if by_label and entry.m is None:
        del facts["m"]  # follows from the number of labels
    if facts["h"]:
        facts["negatives"] = config.negatives.rules
    return facts


def teacher_name(config: Config) -> str:
    mining = config.mining
    return mining.teacher if mining.teacher_adapter is None else f"{mining.teacher} + {mining.teacher_adapter}"


def load_plan(config: Config, entry: DatasetConfig, dataset: PairDataset, variant: str = BASE) -> BatchPlan:
    """The plan of a data set. Raises `RunError` if it is missing or was mined with other data or parameters."""
    folder = plan_folder(config, entry.subset, variant)
    if not (folder / "manifest.json").exists():
        raise RunError(f"no batch plan in {folder}; mine it first: python scripts/mine.py CONFIG.yaml")
    plan = BatchPlan.load(folder)
    facts = wanted(config, entry, dataset, variant)
    if plan.manifest.get("imported") is not None:  # mined elsewhere, with parameters that the files do not tell
        facts = {key: facts[key] for key in ("data_fingerprint", "K", "h")}
    for key, value in facts.items():
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
    config: Config, entry: DatasetConfig, dataset: PairDataset, teacher: Teacher | None
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


def _load_teacher(config: Config) -> Teacher | None:
    """The teacher model, or None when its embeddings are given as arrays."""
    mining = config.mining
    if mining.teacher.startswith(SENTENCE_TRANSFORMER):
        if mining.teacher_adapter is not None:
            raise RunError(f"mining.teacher_adapter has no effect with mining.teacher {mining.teacher}; leave it out")
        from b3.model.sentence_transformer import SentenceTransformerTeacher

        return SentenceTransformerTeacher(mining.teacher.removeprefix(SENTENCE_TRANSFORMER))
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


def mine_recipe(config: Config, show_progress: bool = False) -> dict[str, BatchPlan]:
    """Mine every data set of a recipe that has no plan yet; returns all plans by subset, variants by SUBSET@NAME.

    Plans are saved one by one, so an interrupted run keeps those that are done. `mining.dir`/report.html shows all.
    Raises `InputError` for data or embeddings that cannot be used and for an existing plan that does not fit.
    """
    from b3.mining.report_html import Section, write_report_html

    plans: dict[str, BatchPlan] = {}
    sections = []
    teacher: Teacher | None = None
    teacher_used = False
    variants = config.mined_plans or [BASE]  # who mines for random batches wants to see the base plan
    datasets = [load_dataset(config, entry) for entry in config.data.datasets]
    for entry, dataset in zip(config.data.datasets, datasets, strict=True):
        embeddings: tuple[np.ndarray, np.ndarray] | None = None
        for variant in variants:
            name = plan_name(entry.subset, variant)
            if (plan_folder(config, entry.subset, variant) / "manifest.json").exists():
                plans[name] = load_plan(config, entry, dataset, variant)
            else:
                if not teacher_used:
                    teacher, teacher_used = _load_teacher(config), True
                embeddings = embeddings or teacher_embeddings(config, entry, dataset, teacher)
                plans[name] = _mine_plan(config, entry, dataset, variant, embeddings, show_progress)
            if plans[name].measured:
                sections.append(Section(plans[name], dataset, name=plan_name(dataset.name, variant)))
    page = Path(config.mining.dir) / "report.html"
    if sections and (teacher_used or not page.exists()):
        write_report_html(page, sections)
    return plans


def _mine_plan(
    config: Config,
    entry: DatasetConfig,
    dataset: PairDataset,
    variant: str,
    embeddings: tuple[np.ndarray, np.ndarray],
    show_progress: bool,
) -> BatchPlan:
    """Mine and save one plan."""
    from b3.mining.mine import mine
    from b3.mining.negatives import NegativeRules

    facts, mining = wanted(config, entry, dataset, variant), config.mining_of(variant)
    with stage_bar(plan_name(entry.subset, variant), show_progress) as progress:
        plan = mine(
            *embeddings,
            p=facts["p"],
            m=facts.get("m", mining.m),
            community_size=mining.k,
            hard_negatives=facts["h"],
            seed=config.seed,
            edges=facts["edges"],
            veto=mining.veto,
            partitioner=mining.partitioner,
            refine_passes=mining.refine_passes,
            negative_rules=NegativeRules(**facts["negatives"]) if facts["h"] else None,
            target_unit=facts["target_unit"],
            subset_rows=facts["subset_rows"],
            progress=progress,
            data_fingerprint=facts["data_fingerprint"],
            teacher=facts["teacher"],
        )
    if plan.manifest["m"] != facts.get("m", plan.manifest["m"]):
        raise ConfigError(
            f"m {facts['m']} of {entry.subset} has no effect with mining.target_unit label30, which takes"
            f" {plan.manifest['m']} labels (30 %); leave m out"
        )
    plan.save(plan_folder(config, entry.subset, variant))
    return plan
