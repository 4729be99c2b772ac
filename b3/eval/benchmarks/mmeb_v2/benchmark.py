"""MMEB-V2 as a benchmark: how the rows of a task become queries and candidates, by its schema."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from b3.errors import DataError, InputError
from b3.eval.benchmark import Benchmark
from b3.eval.benchmarks.mmeb_v2 import image, pages, video, video_qa
from b3.eval.benchmarks.mmeb_v2.harness import Harness
from b3.eval.benchmarks.mmeb_v2.published import leaderboard_json, published_marks, published_scores
from b3.eval.benchmarks.mmeb_v2.source import Source
from b3.eval.benchmarks.mmeb_v2.table import RENAMED, TASKS, Load, V2Task
from b3.eval.ranked import RankedSet

Parser = Callable[[V2Task, Source, Harness, Load], RankedSet]
SCHEMAS: dict[str, Parser] = {
    **dict.fromkeys(("image_cls", "image_qa", "image_i2t", "image_t2i", "image_i2i"), image.images),
    "video_cls": video.classes,
    "video_cls_local": video.own_classes,
    "video_ret": video.retrieval,
    "moments": video.moments,
    "momentseeker": video.moment_seeker,
    "video_mme": video_qa.video_mme,
    "nextqa": video_qa.nextqa,
    "egoschema": video_qa.egoschema,
    "activitynetqa": video_qa.activitynetqa,
    "mvbench": video_qa.mvbench,
    **dict.fromkeys(("pages", "pages_english", "visrag"), pages.pages),
}


def load_task(
    source: str,
    name: str,
    split: str = "test",
    *,
    image_dir: str | None = None,
    prefix_targets: bool = False,
    harness: str = "vlm2vec",
    prompt: str = "plain",
    captions: str = "path",
    ndcg: str = "right",
    lenient: bool = False,
) -> RankedSet:
    """The queries and candidates of one task.

    Args:
        source: folder laid out as the hub, or "hub".
        split: not used; each task has its own.
        image_dir: folder of the unpacked archives.
        harness, prompt: as `Harness.of`. captions, ndcg, prefix_targets: as `Load`. lenient: as `Source`.

    Raises `DataError` naming the row, the file or the folder that cannot be used.
    """
    task = next((task for task in TASKS if task.name == name), None)
    if task is None:
        raise InputError(f"MMEB-V2 has no task '{name}'; choose names, groups, image, video, visdoc or all")
    if source != "hub" and not Path(source).is_dir():
        raise DataError(
            f"--dataset_name {source} is no folder; give one laid out as OWNER/NAME/[CONFIG/]SPLIT*.parquet"
        )
    if image_dir is not None and not Path(image_dir).is_dir():
        raise DataError(f"--data_basedir {image_dir} does not exist; give the folder of the unpacked archives")
    tables = None if source == "hub" else Path(source)
    data = Source(tables, None if image_dir is None else Path(image_dir), lenient)
    dataset = SCHEMAS[task.schema](task, data, Harness.of(harness, prompt), Load(captions, ndcg, prefix_targets))
    dataset.notes.extend(data.notes())
    return dataset


def available(source: str, split: str) -> list[str]:
    """The tasks whose tables a local copy of the hub has; [] where all have to be assumed."""
    if source == "hub" or not Path(source).is_dir():
        return []

    def tables(task: V2Task) -> list[str]:
        configs = {"image": [task.config], "visdoc": ["queries", "corpus", "qrels"]}
        return video_qa.MVBENCH if task.config == "*" else configs.get(task.modality, [task.config])

    return [
        task.name
        for task in TASKS
        if all(any((Path(source) / task.hub / config).glob(f"{task.split}*.parquet")) for config in tables(task))
    ]


MMEB_V2 = Benchmark(
    "mmeb_v2",
    TASKS,
    "hub",
    load=load_task,
    subsets=available,
    published=published_scores,
    marks=published_marks,
    leaderboard=leaderboard_json,
    renamed=RENAMED,
    has_harnesses=True,
)
