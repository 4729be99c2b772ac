"""Visual documents: queries, a corpus of page images, and graded judgements (the three tables of BEIR)."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from b3.data.images import FolderImages, ImageRef, ImageStore, RowGroups, decode
from b3.data.items import Still
from b3.errors import DataError
from b3.eval.benchmarks.mmeb_v2.harness import Harness
from b3.eval.benchmarks.mmeb_v2.source import Source
from b3.eval.benchmarks.mmeb_v2.table import Load, V2Task
from b3.eval.ranked import Name, RankedQuery, RankedSet

CONTENT = "Understand the content of the provided document image."
Judgements = dict[Any, dict[Name, float]]  # grades of pages by query


def pages(task: V2Task, source: Source, harness: Harness, load: Load) -> RankedSet:
    """Any of the document tasks; `task.schema` says whether pages are files by name (VisRAG), or only English queries
    count. Raises `DataError` for a query without a page, or a grade that is not a number.
    """
    records = source.rows(task.hub, "queries", task.split, ("query-id", "query"), ("language",))
    if task.schema == "pages_english":
        records = [row for row in records if row["language"] == "english"]
    judgements = _judgements(task, source)
    store = page_store(task, source)
    corpus = [row["corpus-id"] for row in source.rows(task.hub, "corpus", task.split, ("corpus-id",))]
    repeated = len(corpus) - len(set(corpus))
    if repeated:
        source.counts[f"pages of {task.name} whose name occurred before; the first counts"] += repeated
    queries, known = [], set(corpus)
    order: dict[Name, None] = {}
    for row in records:
        grades = judgements.get(row["query-id"])
        if not grades:
            raise DataError(f"{task.name} query {row['query-id']!r} has no page with a grade above 0; drop the query")
        lost = next((name for name in grades if name not in known), None)
        if lost is not None:
            raise DataError(f"{task.name} query {row['query-id']!r}: page {lost!r} is not in the corpus")
        names = list(grades)
        order.update(dict.fromkeys(names))
        info = {"cand_names": names, "label_name": names, "rel_scores": list(grades.values())}
        queries.append(RankedQuery(harness.query(task.instruction, row["query"]), info))
    order.update(dict.fromkeys(corpus))
    candidates = {name: harness.target(CONTENT, Still(ImageRef(store, str(name)))) for name in order}
    return RankedSet(task.name, queries, candidates, task.is_local, load.ndcg)


def _judgements(task: V2Task, source: Source) -> Judgements:
    """Grades above 0 by query and page, of a repeated pair the highest, in the order of the table."""
    result: Judgements = {}
    for row, record in enumerate(source.rows(task.hub, "qrels", task.split, ("query-id", "corpus-id", "score"))):
        grade = record["score"]
        if isinstance(grade, bool) or not isinstance(grade, (int, float)) or not math.isfinite(grade):
            raise DataError(f"{task.hub}/qrels row {row}: score {grade!r} is not a number; correct the row")
        if grade > 0:
            own = result.setdefault(record["query-id"], {})
            own[record["corpus-id"]] = max(grade, own.get(record["corpus-id"], grade))
    return result


def page_store(task: V2Task, source: Source) -> ImageStore:
    """Where the pages of a task are: in a folder of the archives, each page that is missing there in the table."""
    places = [source.media / place for place in task.folder.split("|")] if source.media else []
    folder = next((place for place in places if place.is_dir()), None)
    is_named = task.schema == "visrag"
    location = str(source.tables / task.hub / "corpus") if source.tables else task.hub
    table = TablePages(location, task.split, source.tables is not None, is_named)
    return table if folder is None else Pages(FolderImages(folder), table, is_named)


def file_name(name: str, is_named: bool) -> str:
    """The file in which the reference keeps a page. Named pages: 50 characters of the stem and 8 of the MD5 of all."""
    if not is_named:
        return f"{name}.png"
    path = PurePosixPath(name)
    return f"{path.stem[:50]}_{hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:8]}{path.suffix}"


class Pages:
    """Pages as files of a folder; those that are missing come from the corpus table."""

    def __init__(self, folder: FolderImages, table: TablePages, is_named: bool) -> None:
        self.folder, self.table, self.is_named = folder, table, is_named
        self.location = folder.location

    def read(self, path: str) -> bytes:
        name = file_name(path, self.is_named)
        return self.folder.read(name) if (self.folder.root / name).is_file() else self.table.read(path)


class TablePages:
    """Pages inside the parquet files of a corpus table (`corpus-id`, `image`), opened when first read.

    A named page that is not PNG is written anew in the format of its name, as the reference does before it reads it:
    JPEG at PIL's default quality, which loses a little.

    Args:
        location: folder of the parquet files, or (not `is_local`) the repository on the hub.
    """

    def __init__(self, location: str, split: str, is_local: bool, is_named: bool) -> None:
        self._arguments = (location, split, is_local, is_named)
        self.location = location
        self._index: dict[str, tuple[Any, int, int]] = {}
        self._hub: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return TablePages, self._arguments

    def read(self, path: str) -> bytes:
        location, split, is_local, is_named = self._arguments
        if not self._index:
            self._index = dict(self._local(Path(location), split) if is_local else self._remote(location, split))
        if path not in self._index:
            raise DataError(f"page '{path}' is not in the corpus of {location}; check the table")
        groups, group, row = self._index[path]
        value = self._hub[row]["image"] if groups is None else groups.value(group, row)
        content: bytes | None = None if value is None else value["bytes"]
        if content is None:
            raise DataError(f"page '{path}' of {location} has no image bytes; restore the table")
        suffix = PurePosixPath(path).suffix.lower()
        return _rewritten(content, path, suffix) if is_named and suffix != ".png" else content

    @staticmethod
    def _local(folder: Path, split: str) -> Iterator[tuple[str, tuple[RowGroups, int, int]]]:
        """Later tables first, so that of a repeated name the first one counts."""
        import pyarrow.parquet as pq

        found = []
        for file in sorted(folder.glob(f"{split}*.parquet")):
            table, groups = pq.ParquetFile(file), RowGroups(str(file), "image", 2)
            for group in range(table.num_row_groups):
                names = table.read_row_group(group, columns=["corpus-id"]).column(0).to_pylist()
                found += [(str(name), (groups, group, row)) for row, name in enumerate(names)]
        return reversed(found)

    def _remote(self, repository: str, split: str) -> Iterator[tuple[str, tuple[None, int, int]]]:
        import datasets

        table = datasets.load_dataset(repository, "corpus", split=split)
        self._hub = table.cast_column("image", datasets.Image(decode=False))
        names = table["corpus-id"]
        return ((str(names[row]), (None, 0, row)) for row in range(len(names) - 1, -1, -1))


def _rewritten(content: bytes, name: str, suffix: str) -> bytes:
    from PIL import Image

    image = decode(content, name)
    stream = io.BytesIO()
    kind = Image.registered_extensions().get(suffix)
    if kind is None:
        return content
    image.convert("RGB" if image.mode not in ("L", "CMYK") else image.mode).save(stream, kind)
    return stream.getvalue()
