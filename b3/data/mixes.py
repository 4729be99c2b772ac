"""Rows of the training sets behind MMEB-V2's video and document tasks: further names of `data.format`.

LLaVA-Hound (ShareGPTVideo/train_video_and_instruction): a folder of frames and a conversation of a question and an
answer. `llava_hound_caption`: video and question to caption; `llava_hound_video`: caption to video; `llava_hound_qa`:
video and question to answer. Page sets (vidore/colpali_train_set, openbmb/VisRAG-Ret-Train-In-domain-data): a question
and the image of a page, usually inside the rows. `vidore`, `visrag`: question to page; `vidore_qa`: page and question
to answer.

The pairs of `llava_hound_*` and `vidore_qa` are those of VLM2Vec's training, main at 6e1e1d4. Questions to pages are
written as MMEB-V2's evaluation writes them; VLM2Vec has a longer instruction for each source of VisRAG, and trains on
the pages of ColPali as `vidore_qa` does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.data.images import RowGroups
from b3.data.prompts import PLACEHOLDER, VIDEO_PLACEHOLDER
from b3.data.tables import at_revision, blocks_of, files_of
from b3.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FORMS = ("llava_hound_caption", "llava_hound_video", "llava_hound_qa", "vidore", "vidore_qa", "visrag")
IMAGE = "image"  # the column that may hold whole images
KEPT_GROUPS = 16
_TALK = {
    "id": "1",
    "video": "v1",
    "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A cat jumps."}],
}
_PAGE = {"query": "Who wrote it?", "image": "a.jpg", "answer": "A poet"}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    **{form: [_TALK] for form in FORMS[:3]},
    **{form: [_PAGE] for form in FORMS[3:]},
}
FIND_VIDEO = "Find a video that contains the following visual content: "
SEE_VIDEO = f"Understand the content of the provided video: {VIDEO_PLACEHOLDER}"
ANSWER = "Answer a question based on the content of a video. "
FIND_PAGE = "Find a document image that matches the given query: "
SEE_PAGE = f"{PLACEHOLDER} Understand the content of the provided document image."


class Unfit(Exception):
    """Why a row does not fit."""


def read(record: dict[str, Any], form: str) -> dict[str, str]:
    """A row in the columns of format mmeb. Raises `Unfit`, `KeyError` or `TypeError` where it does not fit."""
    if form.startswith("llava_hound_"):
        return _talk(record, form)
    page, query = record[IMAGE], _text(record, "query")
    if not isinstance(page, str) or not page:
        raise Unfit(f"'{IMAGE}' is {'missing' if not page else type(page).__name__}; a path or the image is needed")
    if form == "vidore_qa":
        return {**_EMPTY, "qry": f"{PLACEHOLDER} {query}", "qry_image_path": page, "pos_text": _text(record, "answer")}
    return {**_EMPTY, "qry": FIND_PAGE + query, "pos_text": SEE_PAGE, "pos_image_path": page}


_EMPTY = dict.fromkeys(("qry", "qry_image_path", "qry_video_path", "pos_text", "pos_image_path", "pos_video_path"), "")


def _talk(record: dict[str, Any], form: str) -> dict[str, str]:
    turns, video = record["conversations"], _text(record, "video")
    if len(turns) < 2:
        raise Unfit(f"{len(turns)} turns in the conversation; a question and an answer are needed")
    asked, answer = (_text(turn, "value") for turn in turns[:2])
    if form == "llava_hound_video":
        return {**_EMPTY, "qry": FIND_VIDEO + answer, "pos_text": SEE_VIDEO, "pos_video_path": video}
    if asked.count("<video>") != 1:
        raise Unfit(f"{asked.count('<video>')} <video> in the question; one is needed")
    start = ANSWER if form == "llava_hound_qa" else ""
    asked = start + asked.replace("<video>", VIDEO_PLACEHOLDER)
    return {**_EMPTY, "qry": asked, "qry_video_path": video, "pos_text": answer}


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise Unfit(f"'{name}' is {'missing' if value is None else type(value).__name__}, a text is needed")
    return value


def holds_images(form: str) -> bool:
    """Whether rows of a format may hold whole images."""
    return form in ("vidore", "vidore_qa", "visrag")


def to_columns(table: pa.Table, form: str, fail: Callable[[int, Exception], DataError], first: int) -> pa.Table:
    """A table of `form` in the columns of mmeb; `fail` makes the error of a row that does not fit."""
    import pyarrow as pa

    is_used = [name for name in _EMPTY if not name.endswith("video_path") or form.startswith("llava_hound_")]
    parts, row = [], first
    for block in blocks_of(table):
        rows = []
        for record in block.to_pylist():
            try:
                rows.append(read(record, form))
            except (Unfit, KeyError, TypeError) as error:
                raise fail(row, error) from None
            row += 1
        parts.append(pa.table({name: pa.array([one[name] for one in rows], pa.string()) for name in is_used}))
    return pa.concat_tables(parts)


def numbered(table: pa.Table, first: int = 0) -> pa.Table:
    """A table whose images were not read, with the row's number in their place; `first`: that of its first row."""
    import pyarrow as pa

    return table.append_column(IMAGE, pa.array([str(first + row) for row in range(table.num_rows)], pa.string()))


class TableImages:
    """Whole images in a column of a data set's rows, by row number; read when they are needed.

    Args:
        source: source line of parquet files or of the hub. subset, split: as in `b3.data.tables.load_table`.
    """

    def __init__(self, source: str, subset: str, split: str) -> None:
        self._arguments = (source, subset, split)
        self.location = f"{source} {subset} {split}"
        self._groups: list[tuple[RowGroups, int]] = []
        self._starts: list[int] = []  # first row of each group
        self._hub: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return TableImages, self._arguments

    def read(self, path: str) -> bytes:
        value = self._value(int(path))
        content: bytes | None = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise DataError(f"row {path} of {self.location} holds no image; drop the row")
        return content

    def _value(self, row: int) -> Any:
        files = files_of(*self._arguments)
        if files is None:
            return self._of_hub(row)
        if not self._starts:
            self._index(files)
        place = bisect_right(self._starts, row) - 1
        groups, group = self._groups[place]
        return groups.value(group, row - self._starts[place])

    def _index(self, files: list[Path]) -> None:
        import pyarrow.parquet as pq

        starts, start = [], 0
        for file in files:
            metadata, groups = pq.ParquetFile(file).metadata, RowGroups(str(file), IMAGE, KEPT_GROUPS)
            for group in range(metadata.num_row_groups):
                self._groups.append((groups, group))
                starts.append(start)
                start += metadata.row_group(group).num_rows
        self._starts = starts  # last: other threads look here first

    def _of_hub(self, row: int) -> Any:
        if self._hub is None:
            import datasets

            source, subset, split = self._arguments
            name, revision = at_revision(source.removeprefix("hub:"))
            table = datasets.load_dataset(name, subset, split=split, revision=revision)
            self._hub = table.cast_column(IMAGE, datasets.Image(decode=False))
        return self._hub[row][IMAGE]
