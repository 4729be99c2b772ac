"""The 36 image tasks: columns qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text, tgt_img_path; element 0 is right.

The rows of MMEB (version 1) with instruction and text apart. Names of candidates are their texts, their image paths, or
both; the reference's names of t2i tasks are paths alone, so that of several captions of one image only the first is
encoded (`captions` "path"); "pair" keeps them apart.
"""

from __future__ import annotations

from typing import Any

from b3.data.images import FolderImages, ImageRef
from b3.data.items import Item, Still
from b3.data.prompts import PLACEHOLDER, target_prefix
from b3.errors import DataError
from b3.eval.benchmarks.mmeb_v2.harness import Harness
from b3.eval.benchmarks.mmeb_v2.source import Source
from b3.eval.benchmarks.mmeb_v2.table import Load, V2Task
from b3.eval.ranked import Name, RankedQuery, RankedSet

COLUMNS = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")
Row = dict[str, Any]


def images(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Any of the image tasks; `task.schema` says which. Raises `DataError` naming a row that does not fit."""
    texts, lists = COLUMNS[:4], COLUMNS[4:]
    rows = source.rows(task.hub, task.config, task.split, lists, texts)
    root = FolderImages(source.folder(task.folder))
    queries: list[RankedQuery] = []
    candidates: dict[Name, Item] = {}
    for number, row in enumerate(rows):
        row.update({name: row[name] or "" for name in texts})
        row["tgt_text"] = [text or "" for text in row["tgt_text"]]
        captions, paths = row["tgt_text"], row["tgt_img_path"]
        if not captions or len(captions) != len(paths):
            raise DataError(
                f"{task.name} row {number}: tgt_text and tgt_img_path must be equally long lists, not empty"
            )
        names: list[Name] = []
        for text, path in zip(captions, paths, strict=True):
            image = Still(ImageRef(root, path)) if path else None
            name = _name(task.schema, text, path or "", load.captions)
            if name not in candidates:
                candidates[name] = _candidate(task, harness, row, text, image, load.prefix_targets)
            names.append(name)
        image = Still(ImageRef(root, row["qry_img_path"])) if row["qry_img_path"] else None
        if image is None and not (row["qry_text"] or row["qry_inst"]).strip():
            raise DataError(f"{task.name} row {number}: the query has neither text nor image; drop the row")
        queries.append(RankedQuery(_query(task, harness, row, image), {"cand_names": names, "label_name": names[0]}))
    return RankedSet(task.name, queries, candidates, task.is_local)


def _name(schema: str, text: str, path: str, captions: str) -> Name:
    if schema == "image_t2i":
        return path if captions == "path" else f"{path}:{text}"
    if schema == "image_i2i":
        return path + ":" + text.strip('"')
    return text


def _query(task: V2Task, harness: Harness, row: Row, image: Still | None) -> Item:
    if harness.is_chat:
        media = () if image is None or task.schema == "image_t2i" else (image,)
        return Item(row["qry_text"], media=media, instruction=row["qry_inst"].replace(PLACEHOLDER, "").strip())
    if task.schema == "image_t2i":  # the token stays, as a literal one
        instruction = row["qry_inst"] if harness.has_tokens else row["qry_inst"].replace(PLACEHOLDER, "").lstrip("\n")
        text = harness.joined("", instruction, row["qry_text"]) + "\n"
        return Item(text + "\n" if task.name == "VisDial" else text)
    instruction = row["qry_inst"].replace(PLACEHOLDER, "")
    if task.schema in ("image_qa", "image_i2i"):
        instruction = "\n" + instruction.strip()
    text = _fixed(harness.joined(harness.mark(image) or PLACEHOLDER, instruction, row["qry_text"])) + "\n"
    return harness.written(text, image)


def _candidate(task: V2Task, harness: Harness, row: Row, text: str, image: Still | None, prefix_targets: bool) -> Item:
    if task.schema not in ("image_t2i", "image_i2i"):
        return Item((target_prefix(task.name) if prefix_targets else "") + text)
    has_captions = bool(row["tgt_text"][0].strip())
    if harness.is_chat:
        is_shown = text.strip() if task.schema == "image_t2i" else has_captions
        return Item(text.strip() if is_shown else None, media=() if image is None else (image,))
    instruction = row["tgt_inst"].replace(PLACEHOLDER, "")
    if has_captions:
        instruction = f"{instruction} {text}"
    written = _fixed(harness.joined(harness.mark(image), instruction))
    return harness.written(written + "\n" if has_captions or task.schema == "image_t2i" else written, image)


def _fixed(text: str) -> str:
    return text.replace(" \n", "\n")
