"""The tasks of MMEB-V2 as a table: 78 tasks (36 image, 18 video, 24 visual document).

tasks.csv has a line per task: modality, group, schema (the parser), where its rows are on the hub, whether a query
ranks its own candidates or all, where its media lie in the archives, the instruction, and how many rows are published.
Three further tasks keep the English queries of the multilingual sets; they belong to no mean.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files

from b3.eval.benchmark import Task

MODALITIES = ("image", "video", "visdoc")
METRIC = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg_linear@5"}
CAPTIONS = ("path", "pair")
RENAMED = (("ViDoSeek-page-fixed", "ViDoSeek-page"), ("MMLongBench-page-fixed", "MMLongBench-page"))


@dataclass(frozen=True, slots=True)
class Load:
    """Choices in loading.

    captions: names of candidates of t2i tasks, "path" or "pair". ndcg: how grades meet labels, "right" or "reference".
    prefix_targets: B3's prefixes before the texts that are candidates in image tasks.
    """

    captions: str = "path"
    ndcg: str = "right"
    prefix_targets: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class V2Task(Task):
    """A line of tasks.csv. num_rows: as published; a table that has more is cut only where the reference cuts it."""

    schema: str
    hub: str
    config: str
    split: str
    is_local: bool
    folder: str
    instruction: str
    num_rows: int


def _tasks() -> tuple[V2Task, ...]:
    with (files("b3.eval.benchmarks.mmeb_v2") / "tasks.csv").open(encoding="utf-8") as file:
        return tuple(
            V2Task(
                name=row["task"],
                family=row["group"],
                metric=METRIC[row["modality"]],
                modality=row["modality"],
                is_counted=row["group"] != "ViDoRe-V2 English",
                takes_square=row["group"] != "V-QA",  # the reference resizes no frames of these
                schema=row["schema"],
                hub=row["hub"],
                config=row["config"],
                split=row["split"],
                is_local=row["candidates"] == "local",
                folder=row["folder"],
                instruction=row["instruction"],
                num_rows=int(row["rows"]),
            )
            for row in csv.DictReader(file)
        )


TASKS = _tasks()
