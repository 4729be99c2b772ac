"""Video classification, video retrieval and moment retrieval: folders of frames."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath

from b3.data.images import FolderImages, ImageRef
from b3.data.items import Item, Still, Video
from b3.errors import DataError
from b3.eval.benchmarks.mmeb_v2.harness import Harness
from b3.eval.benchmarks.mmeb_v2.source import Source
from b3.eval.benchmarks.mmeb_v2.table import Load, V2Task
from b3.eval.ranked import Name, RankedQuery, RankedSet

CONTENT = "Understand the content of the provided video."
CLIP = "Understand the content of the provided video clip."
NAME_COLUMNS = {  # of retrieval: the column that names the video, and the caption's
    "MSR-VTT": ("video_id", "caption"),
    "MSVD": ("video_id", "caption"),
    "DiDeMo": ("video", "caption"),
    "YouCook2": ("id", "sentence"),
    "VATEX": ("videoID", "enCap"),
}
SENTENCE = "Find the clip that corresponds to the given {}:"
BY_IMAGE = "Select the video clip that aligns with the given text and image:"


@cache
def label_lists() -> dict[str, list[str]]:
    """The class names that the reference lists for its data sets, in its order."""
    lists: dict[str, list[str]] = json.loads(
        (files("b3.eval.benchmarks.mmeb_v2") / "labels.json").read_text(encoding="utf-8")
    )
    return lists


def classes(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Classification over all classes: the labels of the rows in row order, then those of the list."""
    rows = source.rows(task.hub, task.config, task.split, ("video_id", "pos_text"))
    root = source.folder(task.folder)
    queries = []
    for number, row in enumerate(rows):
        video = source.video(root / str(row["video_id"]), harness.num_frames, f"{task.name} row {number}")
        info = {"cand_names": [row["pos_text"]], "label_name": row["pos_text"]}
        queries.append(RankedQuery(harness.query(task.instruction, medium=video), info))
    names = dict.fromkeys([*(row["pos_text"] for row in rows), *label_lists().get(task.hub.partition("/")[2], [])])
    return RankedSet(task.name, queries, {name: Item(name) for name in names}, task.is_local)


def own_classes(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Classification among the classes that a row lists (SmthSmthV2): neg_text, the right one included."""
    rows = source.rows(task.hub, task.config, task.split, ("video_id", "pos_text", "neg_text"))[: task.num_rows]
    root = source.folder(task.folder)
    queries, candidates = [], dict[Name, Item]()
    for number, row in enumerate(rows):
        if row["pos_text"] not in row["neg_text"]:
            raise DataError(f"{task.name} row {number}: neg_text lacks pos_text {row['pos_text']!r}; correct the row")
        video = source.video(root / str(row["video_id"]), harness.num_frames, f"{task.name} row {number}")
        info = {"cand_names": row["neg_text"], "label_name": row["pos_text"]}
        queries.append(RankedQuery(harness.query(task.instruction, medium=video), info))
        for name in row["neg_text"]:
            candidates.setdefault(name, Item(name))
    return RankedSet(task.name, queries, candidates, task.is_local)


def retrieval(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Retrieval of a video by a caption; of several captions the first."""
    columns = NAME_COLUMNS[task.name]
    rows = source.rows(task.hub, task.config, task.split, columns)
    root = source.folder(task.folder)
    queries, candidates = [], dict[Name, Item]()
    for number, row in enumerate(rows):
        name, caption = (row[column] for column in columns)
        caption = caption if isinstance(caption, str) else caption[0]
        name = PurePosixPath(name).stem if task.name == "DiDeMo" else name
        if name not in candidates:
            video = source.video(root / str(name), harness.num_frames, f"{task.name} row {number}")
            candidates[name] = harness.target(CONTENT, video)
        info = {"cand_names": [name], "label_name": name}
        queries.append(RankedQuery(harness.query(task.instruction, caption), info))
    return RankedSet(task.name, queries, candidates, task.is_local)


def moments(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """The clip of a video: folders beside ``<video>/query``, in order of their names (the reference takes the file
    system's order); the last one that starts with "positive" is right.
    """
    rows = source.rows(task.hub, task.config, task.split, ("query", "video_path"))
    root = source.folder(task.folder)
    queries, candidates = [], dict[Name, Item]()
    for number, row in enumerate(rows):
        where = f"{task.name} row {number}"
        folder = root / PurePosixPath(row["video_path"]).stem
        if not folder.is_dir():
            raise DataError(f"{where}: folder {folder} is missing; restore it or drop the row")
        clips = sorted((p for p in folder.iterdir() if p.is_dir() and p.name != "query"), key=lambda p: p.name)
        positive = [clip for clip in clips if clip.name.startswith("positive")]
        if not positive:
            raise DataError(f"{where}: no folder of {folder} starts with 'positive', so no candidate is right")
        for clip in clips:
            if source.name(clip) not in candidates:
                video = source.video(clip, harness.clip_frames, where, may_be_empty=True)
                candidates[source.name(clip)] = harness.target(CONTENT, video)
        video = source.video(folder / "query", harness.num_frames, where, may_be_empty=True)
        info = {"cand_names": [source.name(clip) for clip in clips], "label_name": source.name(positive[-1])}
        queries.append(RankedQuery(harness.query(task.instruction, row["query"], video), info))
    return RankedSet(task.name, queries, candidates, task.is_local)


def moment_seeker(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """The clips that fit a text, with an image, a video or alone; all positives are right, all stored frames count."""
    columns = ("query", "positive_frames", "negative_frames")
    rows = source.rows(task.hub, task.config, task.split, columns, ("input_frames",))
    root = source.folder(task.folder)
    queries, candidates = [], dict[Name, Item]()
    for number, row in enumerate(rows):
        where = f"{task.name} row {number}"
        names: dict[str, list[Name]] = {"positive_frames": [], "negative_frames": []}
        for side, own in names.items():
            for entry in row[side]:
                clip = root / "video_frames" / _flat(entry["output_path"])
                if source.name(clip) not in candidates:
                    video = source.video(clip, None, where, may_be_empty=True)
                    candidates[source.name(clip)] = harness.target(CLIP, video)
                own.append(source.name(clip))
        if not names["positive_frames"]:
            raise DataError(f"{where}: no positive_frames, so no candidate is right; drop the row")
        info = {"cand_names": [*names["positive_frames"], *names["negative_frames"]]}
        info["label_name"] = names["positive_frames"]
        queries.append(RankedQuery(_seeking(row, source, root, harness, where), info))
    return RankedSet(task.name, queries, candidates, task.is_local)


def _flat(path: str) -> str:
    return path.replace("/", "_").split(".mp4")[0]


def _seeking(row: dict[str, str], source: Source, root: Path, harness: Harness, where: str) -> Item:
    given = row["input_frames"] or ""
    if given.endswith(".mp4"):
        video: Video = source.video(root / "video_frames" / _flat(given), None, where, may_be_empty=True)
        return harness.query(SENTENCE.format("sentence and video segment"), row["query"], video)
    if given.endswith(".jpg"):
        image = Still(ImageRef(FolderImages(root), f"query_{given}"))
        return harness.query(BY_IMAGE, row["query"], image)
    return harness.query(SENTENCE.format("text"), row["query"])
