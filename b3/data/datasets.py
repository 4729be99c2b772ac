"""Training pairs and evaluation rows, as the rest of the system sees them, and how a source becomes one of the two.

A `PairDataset` gives (query, target, negatives) by row number; an `EvalDataset` gives a query and its own candidate
list, element 0 being right (MMEB).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from b3.config import Config, DatasetConfig
from b3.data.formats import to_pairs
from b3.data.images import ImageRef, ImageStore
from b3.data.items import Item
from b3.data.prompts import PLACEHOLDER, target_prefix
from b3.data.tables import (
    EVAL_COLUMNS,
    PAIR_COLUMNS,
    check_eval,
    check_pairs,
    check_rows,
    default_image_dir,
    image_store,
    load_table,
)

if TYPE_CHECKING:
    import pyarrow as pa


class PairDataset:
    """Training pairs of one data set: `query(i)`, `target(i)` and `negatives(i)` for row i.

    Args:
        name: name of the subset, used in messages, plans and reports.
        table: columns `qry`, `qry_image_path`, `pos_text`, `pos_image_path` and optionally `neg_text`,
            `neg_image_path` (a string or a list of strings each), '' meaning none: the MMEB-train schema.
        images: store of the image paths, or None when no row has an image.
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
        self._columns = {column: table.column(column).combine_chunks() for column in table.column_names}
        self._num_rows = table.num_rows

    def __len__(self) -> int:
        return self._num_rows

    def _value(self, column: str, row: int) -> Any:
        return self._columns[column][row].as_py()

    def column(self, name: str) -> list[Any]:
        """A column as stored, without prefix."""
        values: list[Any] = self._columns[name].to_pylist()
        return values

    def query(self, row: int) -> Item:
        return _item(self.images, self._value("qry", row), self._value("qry_image_path", row))

    def target(self, row: int) -> Item:
        text, path = self._value("pos_text", row), self._value("pos_image_path", row)
        return _item(self.images, text, path, self.target_prefix)

    @property
    def has_negatives(self) -> bool:
        """Whether rows may bring negatives along."""
        return "neg_text" in self._columns

    def negatives(self, row: int) -> list[Item]:
        """Negatives stored in the data row (not the mined ones); empty texts without image are left out."""
        if not self.has_negatives:
            return []
        texts, paths = self._value("neg_text", row), self._value("neg_image_path", row)
        pairs = zip(texts, paths, strict=True) if isinstance(texts, list) else [(texts, paths)]
        return [_item(self.images, text, path, self.target_prefix) for text, path in pairs if text or path]

    def __iter__(self) -> Iterator[tuple[Item, Item]]:
        return ((self.query(row), self.target(row)) for row in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 over all rows in order (texts and image paths, prefix included); equal data, equal fingerprint."""
        return self._fingerprint

    @cached_property  # a run asks for it several times, and it reads every row
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.target_prefix.encode())
        for column in sorted(self._columns):
            digest.update(column.encode())
            for value in self._columns[column].to_pylist():
                text = value if isinstance(value, str) else "\x1e".join(v or "" for v in value or ())
                digest.update(text.encode() + b"\0")
        return digest.hexdigest()


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
        return _item(self.images, record["qry_text"], record["qry_img_path"])

    def raw_candidates(self, row: int) -> list[tuple[str, str]]:
        """(text, image path) of each candidate as stored, without prefix."""
        record = self._rows[row]
        return [(t or "", p or "") for t, p in zip(record["tgt_text"], record["tgt_img_path"], strict=True)]

    def candidates(self, row: int) -> list[Item]:
        return [_item(self.images, self.target_prefix + text, path) for text, path in self.raw_candidates(row)]


def _item(images: ImageStore | None, text: str | None, path: str | None, prefix: str = "") -> Item:
    """`prefix` goes before a text without image."""
    if not path:
        return Item(prefix + (text or ""))
    assert images is not None, "rows with image paths have an image store"
    return Item(text or "", ImageRef(images, path))


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
    check: Callable[[pa.Table, str], None],
    image_dir: str | None,
    max_rows: int | None,
    form: str = "mmeb",
) -> tuple[pa.Table, ImageStore | None]:
    """The first rows of a subset, checked, and the store of their images."""
    where = f"{source} subset {subset} split {split}"
    rows = to_pairs(load_table(source, subset, split), form, where)
    table = check_rows(rows, columns, where).slice(0, max_rows)
    check(table, where)
    paths = tuple(name for name in columns if name.endswith("_path"))
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
