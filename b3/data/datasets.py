"""Training pairs and evaluation rows, as the rest of the system sees them, and how a source becomes one of the two.

A `PairDataset` gives (query, target, negatives) by row number; an `EvalDataset` gives a query and its own candidate
list, element 0 being right (MMEB).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.config import Config, DatasetConfig
from b3.data.formats import one_table, to_pairs
from b3.data.images import FolderImages, ImageRef, ImageStore
from b3.data.items import Item, Medium, Still, Video, video_at
from b3.data.mixes import IMAGE, TableImages, holds_images, numbered
from b3.data.prompts import PLACEHOLDER, target_prefix
from b3.data.samples import images_digest
from b3.data.spool import Spool
from b3.data.tables import (
    EVAL_COLUMNS,
    PAIR_COLUMNS,
    blocks_of,
    check_eval,
    check_pairs,
    check_rows,
    default_image_dir,
    image_store,
    load_blocks,
    parts_of,
)
from b3.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class PairDataset:
    """Training pairs of one data set: `query(i)`, `target(i)` and `negatives(i)` for row i.

    A row of the table with several positives gives as many pairs, one after the other.

    Args:
        name: name of the subset, used in messages, plans and reports.
        table: the MMEB-train schema: columns `qry`, `qry_image_path`, `pos_text`, `pos_image_path` and optionally
            `neg_text`, `neg_image_path`, '' meaning none. A path may be a list, several images of one item; a list in
            `pos_text` or `neg_text` is several items, and the paths are lists of as many. Optional beside these:
            `qry_video_path`, `pos_video_path`, `neg_video_path` (a folder of frames, a file, or a list of frames) and
            `qry_instruction`, `pos_instruction` (of targets and negatives).
        images: store of the paths, or None when no row has any.
        family: "classification", "vqa", "retrieval" or "grounding".
        target_prefix: put before text-only targets and negatives.
    """

    def __init__(
        self,
        name: str,
        table: pa.Table,
        images: ImageStore | None = None,
        family: str = "retrieval",
        target_prefix: str = "",
    ) -> None:
        self.name = name
        self.family = family
        self.images = images
        self.target_prefix = target_prefix
        self._columns = {column: table.column(column) for column in table.column_names}
        self._num_rows = table.num_rows
        self._pairs = _pairs_of(self._columns["pos_text"])

    def __len__(self) -> int:
        return self._num_rows if self._pairs is None else len(self._pairs)

    def place(self, row: int) -> tuple[int, int]:
        """(row of the table, which of its positives) of a pair."""
        return (row, 0) if self._pairs is None else (int(self._pairs[row, 0]), int(self._pairs[row, 1]))

    def where(self, row: int) -> str:
        """The name of a pair in messages."""
        number, positive = self.place(row)
        return f"row {number}" if self._pairs is None else f"row {number}, positive {positive}"

    def _cells(self, row: int, *columns: str) -> list[Any]:
        """Values of a row of the table; None where there is no such column."""
        return [self._columns[name][row].as_py() if name in self._columns else None for name in columns]

    def column(self, name: str) -> list[Any]:
        """A column as stored, without prefix; with several positives in a row, a value for each pair."""
        values: list[Any] = self._columns[name].to_pylist()
        if self._pairs is None:
            return values
        own = name.startswith("pos_") and name != "pos_instruction"
        return [values[r][k] if own and isinstance(values[r], list) else values[r] for r, k in self._pairs.tolist()]

    def _side(self, row: int, side: str, text: str, instruction: str, prefix: str = "") -> list[Item]:
        """Items of one side of a row of the table. Raises `DataError` naming the row for a video that is not there."""
        *cells, asked = self._cells(row, text, f"{side}_image_path", f"{side}_video_path", instruction)
        try:
            return [_item(self.images, *part, prefix=prefix, instruction=asked) for part in parts_of(*cells)]
        except DataError as error:
            raise DataError(f"{self.name} row {row}: {error}") from None

    def query(self, row: int) -> Item:
        return self._side(self.place(row)[0], "qry", "qry", "qry_instruction")[0]

    def target(self, row: int) -> Item:
        return self.positives(row)[self.place(row)[1]]

    def positives(self, row: int) -> list[Item]:
        """All targets that the data call right for the query of a pair, its own among them."""
        return self._side(self.place(row)[0], "pos", "pos_text", "pos_instruction", self.target_prefix)

    @property
    def most_positives(self) -> int:
        """Positives of the row that has most."""
        return 1 if self._pairs is None else int(self._pairs[:, 1].max()) + 1

    @property
    def has_negatives(self) -> bool:
        """Whether rows may bring negatives along."""
        return "neg_text" in self._columns

    def negatives(self, row: int) -> list[Item]:
        """Negatives stored in the data row (not the mined ones); empty texts without image are left out."""
        if not self.has_negatives:
            return []
        items = self._side(self.place(row)[0], "neg", "neg_text", "pos_instruction", self.target_prefix)
        return [item for item in items if item.media or item.text != self.target_prefix]

    def __iter__(self) -> Iterator[tuple[Item, Item]]:
        return ((self.query(row), self.target(row)) for row in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 over all rows in order (texts and paths, prefix included); equal data, equal fingerprint."""
        return self._fingerprint

    @cached_property  # a run asks for it several times, and it reads every row
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.target_prefix.encode())
        for column in sorted(self._columns):
            digest.update(column.encode())
            for block in blocks_of(self._columns[column]):
                for value in block.to_pylist():
                    digest.update(_joined(value).encode() + b"\0")
        return digest.hexdigest()

    def images_digest(self) -> str:
        """A digest of some images by their bytes; '' if no row that is looked at has any."""
        return images_digest(self.query, len(self)) + images_digest(self.target, len(self))


def _pairs_of(texts: pa.ChunkedArray) -> np.ndarray | None:
    """(pairs, 2) int64, row of the table and number of the positive; None if each row has one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type)):
        return None
    counts = pc.fill_null(pc.list_value_length(texts), 0).to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(counts)), counts)
    return np.stack([rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]], axis=1)


def _joined(value: Any) -> str:
    """A cell as one text: elements of lists, and of lists in them, apart by a character of their own."""
    if isinstance(value, list):
        return "\x1e".join("\x1d".join(v or "" for v in one) if isinstance(one, list) else one or "" for one in value)
    return value or ""


class EvalDataset:
    """Rows of one evaluation subset in the MMEB-eval schema.

    `table` has `qry_text`, `qry_img_path` and the lists `tgt_text`, `tgt_img_path`; candidate 0 is the positive.
    `target_prefix` goes before every target text (``--tgt_prefix_mod``); `raw_candidates` gives the unprefixed pairs
    that prediction files show.
    """

    def __init__(
        self,
        name: str,
        table: pa.Table,
        images: ImageStore | None = None,
        target_prefix: str = "",
    ) -> None:
        self.name = name
        self.images = images
        self.target_prefix = target_prefix
        self._rows = table.select(["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]).to_pylist()

    def __len__(self) -> int:
        return len(self._rows)

    def query(self, row: int) -> Item:
        record = self._rows[row]
        return _item(self.images, record["qry_text"], _named(record["qry_img_path"]))

    def raw_candidates(self, row: int) -> list[tuple[str, str]]:
        """(text, image path) of each candidate as stored, without prefix."""
        record = self._rows[row]
        return [(t or "", p or "") for t, p in zip(record["tgt_text"], record["tgt_img_path"], strict=True)]

    def candidates(self, row: int) -> list[Item]:
        prefixed = [(self.target_prefix + text, path) for text, path in self.raw_candidates(row)]
        return [_item(self.images, text, _named(path)) for text, path in prefixed]


def _named(path: str | None) -> list[str]:
    return [path] if path else []


def _item(
    images: ImageStore | None,
    text: str | None,
    paths: list[str],
    video: str | list[str] | None = None,
    prefix: str = "",
    instruction: str | None = None,
) -> Item:
    """`prefix` goes before a text without media. Raises `DataError` for a video that is not there."""
    if not paths and not video:
        return Item(prefix + (text or ""), instruction=instruction or None)
    assert images is not None, "rows with paths have an image store"
    media: list[Medium] = [Still(ImageRef(images, path)) for path in paths]
    if isinstance(video, str):
        media.append(_video(images, video))
    elif video:
        media.append(Video(tuple(Still(ImageRef(images, path)) for path in video)))
    return Item(text or "", media=tuple(media), instruction=instruction or None)


def _video(images: ImageStore, path: str) -> Video:
    """The folder of frames, or the file, at a path of a store."""
    if not isinstance(images, FolderImages):
        raise DataError(
            f"video '{path}' is a folder or a file, and {images.location} holds images alone; list the frames, or give"
            " a folder as image_dir"
        )
    return video_at(images.file(path))


def load_pairs(
    source: str,
    subset: str,
    split: str = "train",
    *,
    family: str = "retrieval",
    image_dir: str | None = None,
    prefix_targets: bool = True,
    max_rows: int | None = None,
    form: str = "mmeb",
) -> PairDataset:
    """Training pairs of one subset.

    Args:
        source: source line, see `b3.data.tables`.
        subset: configuration of the hub data set, folder or file stem; also the name.
        split: "original" or "diverse_instruction" for MMEB-train, "train" for the embedded data.
        image_dir: folder or `.parquet` file of images; not needed for embedded data.
        prefix_targets: put the subset's prefix of `b3.data.prompts` before text-only targets.
        max_rows: keep the first rows only.
        form: of the rows, one of `b3.data.formats.FORMATS`.

    Raises:
        DataError: nothing found, a column is missing, or a row has neither text nor image.
    """
    table, store = _load(source, subset, split, PAIR_COLUMNS, check_pairs, image_dir, max_rows, form)
    return PairDataset(subset, table, store, family, target_prefix(subset) if prefix_targets else "")


def load_eval(
    source: str,
    subset: str,
    split: str = "test",
    *,
    image_dir: str | None = None,
    prefix_targets: bool = False,
    max_rows: int | None = None,
) -> EvalDataset:
    """One evaluation subset (MMEB-eval schema). Arguments and errors as `load_pairs`."""
    table, store = _load(source, subset, split, EVAL_COLUMNS, check_eval, image_dir, max_rows)
    return EvalDataset(subset, table, store, target_prefix(subset) if prefix_targets else "")


def _load(
    source: str,
    subset: str,
    split: str,
    columns: tuple[str, ...],
    check: Callable[[pa.Table, str, int], None],
    image_dir: str | None,
    max_rows: int | None,
    form: str = "mmeb",
) -> tuple[pa.Table, ImageStore | None]:
    """The first rows of a subset, checked, and the store of their images."""
    where = f"{source} subset {subset} split {split}"
    is_inside, num_read, num_kept, parts = False, 0, 0, list[Spool]()
    with ExitStack() as stack:
        for rows in load_blocks(source, subset, split, IMAGE if holds_images(form) else None):
            if not len(rows):
                continue
            is_inside = holds_images(form) and IMAGE not in rows.column_names
            pairs = to_pairs(numbered(rows, num_read) if is_inside else rows, form, where, num_read)
            table = check_rows(pairs, columns, where).slice(0, None if max_rows is None else max_rows - num_kept)
            check(table, where, num_kept)
            if not parts or parts[-1].schema != table.schema:
                parts.append(stack.enter_context(Spool(table.schema)))
            parts[-1].extend(table)
            num_read, num_kept = num_read + len(rows), num_kept + len(table)
            if num_kept == max_rows:
                break
        if not parts:
            raise DataError(f"{where}: no rows")
        table = one_table([part.table() for part in parts])
    if is_inside:
        return table, TableImages(source, subset, split)
    paths = tuple(name for name in table.column_names if name.endswith("_path"))
    return table, image_store(table, paths, image_dir or default_image_dir(source), where)


def load_dataset(config: Config, entry: DatasetConfig) -> PairDataset:
    """One training data set of a recipe; raises `DataError` as `load_pairs`."""
    data = config.data
    return load_pairs(
        entry.source or data.source,
        entry.subset,
        entry.split or data.split,
        family=entry.family,
        image_dir=entry.image_dir or data.image_dir,
        prefix_targets=data.prefix_targets,
        max_rows=entry.max_rows,
        form=entry.format or data.format,
    )


def load_datasets(config: Config) -> list[PairDataset]:
    """All training data sets, in the recipe's order."""
    return [load_dataset(config, entry) for entry in config.data.datasets]


def texts_of(datasets: list[PairDataset]) -> Iterator[str]:
    """All texts of queries and targets, without the image placeholder."""
    for dataset in datasets:
        for query, target in dataset:
            yield (query.text or "").replace(PLACEHOLDER, "")
            yield (target.text or "").replace(PLACEHOLDER, "")
