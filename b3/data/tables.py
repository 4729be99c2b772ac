"""One loader for every place that rows can come from.

A source line is ``embedded:NAME`` (travels with the package), ``hub:OWNER/NAME``, ``hub:OWNER/NAME@REVISION`` or
``hub:FOLDER`` (read by the `datasets` library), ``parquet:PATH`` or ``jsonl:PATH``. A PATH is a file, a glob, or a
folder laid out like the hub's (``<folder>/<subset>/<split>*.parquet``). All of them end as the same Arrow table,
checked row by row.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.data.images import ImageStore, open_store
from b3.data.jsonl import read_jsonl
from b3.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PAIR_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
MORE_COLUMNS = ("qry_video_path", "pos_video_path", "neg_video_path", "qry_instruction", "pos_instruction")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
BLOCK_ROWS = 16384  # of a table that is read or looked through at a time
SOURCE_KINDS = ("embedded", "hub", "parquet", "jsonl")


def split_source(source: str) -> tuple[str, str]:
    """('parquet', 'data/x.parquet') from a source line; a bare path is told by its ending."""
    kind, colon, rest = source.partition(":")
    if colon and kind in SOURCE_KINDS:
        return kind, rest
    if source.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl", source
    if source.endswith(".parquet") or Path(source).is_dir():
        return "parquet", source
    if "/" in source and not Path(source).suffix and not source.startswith((".", "/")):
        return "hub", source
    raise DataError(f"source '{source}' is not understood; use one of {', '.join(k + ':...' for k in SOURCE_KINDS)}")


def embedded_root(name: str) -> Path:
    """Folder of a data set that travels with the package. Raises `DataError` naming those that exist."""
    here = Path(__file__).parent
    known = sorted(p.parent.name for p in here.glob("*/dataset.json"))
    if name not in known:
        raise DataError(f"embedded data set '{name}' does not exist; there is: {', '.join(known) or 'none'}")
    return here / name


def list_subsets(source: str, split: str) -> list[str]:
    """Names of the subsets that a local source holds for `split`, sorted; [] when they cannot be listed."""
    kind, rest = split_source(source)
    if kind == "embedded":
        return sorted(p.stem for p in (embedded_root(rest) / split).glob("*.parquet"))
    root = Path(rest)
    return sorted({p.parent.name for p in root.glob(f"*/{split}*.parquet")}) if root.is_dir() else []


def default_image_dir(source: str) -> str | None:
    """The image store that belongs to a source when the configuration names none."""
    kind, rest = split_source(source)
    return str(embedded_root(rest) / "images.parquet") if kind == "embedded" else None


def load_table(source: str, subset: str, split: str, leave_out: str | None = None) -> pa.Table:
    """All rows of a subset and split as one table in memory. Arguments and errors as `load_blocks`."""
    import pyarrow as pa

    return pa.concat_tables(list(load_blocks(source, subset, split, leave_out)), promote_options="default")


def load_blocks(source: str, subset: str, split: str, leave_out: str | None = None) -> Iterator[pa.Table]:
    """All rows of a subset and split as Arrow tables of bounded size; at least one table.

    leave_out: a column that is not read where it holds whole images (bytes, or the struct of the `datasets` library).
    Raises `DataError` naming what is missing and what exists.
    """
    kind, rest = split_source(source)
    files = files_of(source, subset, split)
    if files is None:
        table = _load_hub(rest, subset, split)
        yield from blocks_of(table.drop_columns([leave_out]) if _is_whole(table.schema, leave_out) else table)
        return
    if not files:
        known = list_subsets(source, split)
        hint = f"; subsets there: {', '.join(known)}" if known else "; check the split"
        if kind != "embedded" and not Path(rest).exists():
            hint = ", where nothing is"
        raise DataError(f"no rows of subset '{subset}', split '{split}' in {source}{hint}")
    for file in files:
        yield from _read_file(kind, file, leave_out)


def files_of(source: str, subset: str, split: str) -> list[Path] | None:
    """The files that hold a subset and split, in order; None for the hub."""
    kind, rest = split_source(source)
    return None if kind == "hub" else _find_files(kind, rest, subset, split)


def _is_whole(schema: pa.Schema, column: str | None) -> bool:
    """Whether a column holds whole images."""
    import pyarrow as pa

    if column is None or column not in schema.names:
        return False
    kind = schema.field(column).type
    return bool(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _find_files(kind: str, rest: str, subset: str, split: str) -> list[Path]:
    if kind == "embedded":
        file = embedded_root(rest) / split / f"{subset}.parquet"
        return [file] if file.is_file() else []
    path = Path(rest)
    if path.is_file():
        return [path]
    if path.is_dir():
        ending = "parquet" if kind == "parquet" else "jsonl"
        return sorted((path / subset).glob(f"{split}*.{ending}")) or sorted((path / split).glob(f"{subset}.{ending}"))
    return sorted(Path(p) for p in glob.glob(rest, recursive=True))


def _read_file(kind: str, file: Path, leave_out: str | None = None) -> Iterator[pa.Table]:
    import pyarrow as pa

    try:
        for table in read_jsonl(file) if kind == "jsonl" else _read_parquet(file, leave_out):
            table.validate(full=True)  # neither reader looks whether texts are UTF-8
            yield table
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        what = str(error).splitlines()[0]
        name = "jsonl" if kind == "jsonl" else "parquet"
        raise DataError(f"{file} cannot be read as {name} ({what}); correct or replace the file") from None


def _read_parquet(file: Path, leave_out: str | None) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(file)
    schema = opened.schema_arrow
    names = [name for name in schema.names if name != leave_out] if _is_whole(schema, leave_out) else schema.names
    if not opened.metadata.num_rows:
        yield schema.empty_table().select(names)
    for batch in opened.iter_batches(BLOCK_ROWS, columns=names):
        yield pa.Table.from_batches([batch])


def at_revision(name: str) -> tuple[str, str | None]:
    """("OWNER/NAME", revision or None) of a hub name that may pin one: OWNER/NAME@REVISION."""
    base, _, revision = name.partition("@")
    return base, revision or None


def _load_hub(name: str, subset: str, split: str) -> pa.Table:
    import datasets

    datasets.disable_progress_bars()
    base, revision = at_revision(name)
    try:
        table = datasets.load_dataset(base, subset or None, split=split, revision=revision).data.table
    except Exception as error:  # the library raises many types, some from its own dependencies
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"subset '{subset}', split '{split}' of hub data set '{name}' cannot be loaded: {what}"
        ) from None
    return table


def check_rows(table: pa.Table, columns: tuple[str, ...], where: str) -> pa.Table:
    """Keep `columns` (and negatives if present), nulls become ''; raises `DataError` with the first bad row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise DataError(
            f"{where}: column(s) {', '.join(missing)} missing; found {', '.join(table.column_names)};"
            f" expected {', '.join(columns)}"
        )
    if columns is PAIR_COLUMNS:
        present = tuple(c for c in NEGATIVE_COLUMNS if c in table.column_names)
        if len(present) == 1:
            raise DataError(f"{where}: neg_text and neg_image_path go together; found only {present[0]}")
        columns = columns + present + tuple(c for c in MORE_COLUMNS if c in table.column_names)
    table = table.select(columns)
    for index, name in enumerate(table.column_names):
        column = table.column(name)
        if pa.types.is_null(column.type):
            column = column.cast(pa.string())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.fill_null(column, "").cast(pa.large_string())
        elif not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            raise DataError(f"{where}: column {name} has type {column.type}; expected text or a list of texts")
        table = table.set_column(index, name, column)
    if table.num_rows == 0:
        raise DataError(f"{where}: no rows")
    return table


def check_pairs(table: pa.Table, where: str, first: int = 0) -> None:
    """Raise `DataError` naming the first row with a side that is empty, or whose lists do not fit each other.

    first: the number of the table's first row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for side, text, path, video in SIDES:
        if text not in table.column_names:
            continue
        if video in table.column_names or not all(pa.types.is_large_string(table[c].type) for c in (text, path)):
            _check_lists(table, side, where, first)
        elif side != "negative":
            empty = pc.and_(pc.equal(pc.utf8_trim_whitespace(table[text]), ""), pc.equal(table[path], ""))
            row = pc.index(empty, True).as_py()
            if row >= 0:
                raise DataError(
                    f"{where}: row {first + row}: the {side} has neither text nor image ({text}, {path}); drop the row"
                )


SIDES = tuple(  # name of each side, and its columns of texts, images and videos
    (side, *columns, columns[1].replace("image", "video"))
    for side, columns in (("query", PAIR_COLUMNS[:2]), ("target", PAIR_COLUMNS[2:]), ("negative", NEGATIVE_COLUMNS))
)


def parts_of(text: Any, images: Any, videos: Any = None) -> list[tuple[str, list[str], Any]]:
    """(text, image paths, video) of each item of a cell: one where the text is a string, else one per text.

    images: of one item a path or a list of paths, '' for none; of several items a list of these. videos: as images,
    where a list of paths is the frames of one video. Raises `DataError` for lists of different lengths.
    """
    if not isinstance(text, list):
        text, images, videos = [text], [images], [videos]
    images, videos = (
        [None] * len(text) if v is None or v == "" else v if isinstance(v, list) else [v] for v in (images, videos)
    )
    if not len(text) == len(images) == len(videos):
        counts = f"{len(text)} texts, {len(images)} image paths" + f", {len(videos)} videos" * (
            videos != [None] * len(text)
        )
        raise DataError(f"{counts}; as many of each are needed")
    named = [[name for name in (v if isinstance(v, list) else [v]) if name] for v in images]
    return list(zip([one or "" for one in text], named, [v or None for v in videos], strict=True))


def blocks_of(rows: Any) -> Iterator[Any]:
    """A table or an array of Arrow in slices of at most `BLOCK_ROWS` rows; at least one."""
    for start in range(0, max(1, len(rows)), BLOCK_ROWS):
        yield rows.slice(start, BLOCK_ROWS)


def _check_lists(table: pa.Table, side: str, where: str, first: int) -> None:
    """As `check_pairs`, of a side with lists or videos."""
    names = next(entry[1:] for entry in SIDES if entry[0] == side)
    if "qry" in names and "list" in str(table["qry"].type):
        raise DataError(f"{where}: column qry has type {table['qry'].type}; a row has one query, a text")
    cells_of_rows = (
        cells
        for block in blocks_of(table.select([name for name in names if name in table.column_names]))
        for cells in ([record.get(name) for name in names] for record in block.to_pylist())
    )
    for row, cells in enumerate(cells_of_rows, first):
        try:
            parts = parts_of(*cells)
        except DataError as error:
            raise DataError(f"{where}: row {row}: the {side} has {error} ({', '.join(names[:2])})") from None
        if side != "negative" and not all(
            text.strip() or images or video for text, images, video in parts or [("", [], None)]
        ):
            raise DataError(
                f"{where}: row {row}: the {side} has neither text nor image ({names[0]}, {names[1]}); drop the row"
            )


def check_eval(table: pa.Table, where: str, first: int = 0) -> None:
    """Raise `DataError` naming the first evaluation row that is empty or whose candidate lists do not fit."""
    for row, record in enumerate(table.to_pylist(), first):
        texts, paths = record["tgt_text"], record["tgt_img_path"]
        if not isinstance(texts, list) or not isinstance(paths, list) or len(texts) != len(paths):
            raise DataError(f"{where}: row {row}: tgt_text and tgt_img_path must be lists of equal length")
        if not texts:
            raise DataError(f"{where}: row {row}: no candidates")
        if not (record["qry_text"].strip() or record["qry_img_path"]):
            raise DataError(f"{where}: row {row}: the query has neither text nor image; drop the row")
        for index, (text, path) in enumerate(zip(texts, paths, strict=True)):
            if not ((text or "").strip() or path):
                raise DataError(f"{where}: row {row}: candidate {index} has neither text nor image")


def image_store(table: pa.Table, columns: tuple[str, ...], image_dir: str | None, where: str) -> ImageStore | None:
    """The store of `image_dir`, or None where no row names an image. Raises `DataError` if it is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if image_dir is not None:
        if not Path(image_dir).exists():
            raise DataError(f"{where}: image_dir {image_dir} does not exist; give a folder or .parquet of images")
        return open_store(image_dir)
    for name in columns:
        column = table[name]
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = pc.list_flatten(column)
        if pa.types.is_null(column.type):
            continue
        if pc.any(pc.not_equal(pc.fill_null(column, ""), "")).as_py():
            raise DataError(f"{where}: rows have image paths ({name}); give image_dir, the folder of the images")
    return None


def embedded_teacher(name: str, subset: str) -> tuple[Any, Any]:
    """Precomputed teacher embeddings of an embedded data set: (queries, targets), each (N, D) float16."""
    from safetensors.numpy import load_file

    file = embedded_root(name) / "teacher.safetensors"
    tensors = load_file(file)
    if f"{subset}/queries" not in tensors:
        raise DataError(f"{file} has no teacher embeddings of subset '{subset}'")
    vectors = tensors["vectors"]
    return vectors[tensors[f"{subset}/queries"]], vectors[tensors[f"{subset}/targets"]]


def embedded_families(name: str) -> dict[str, str]:
    """Family of each subset of an embedded data set."""
    described = json.loads((embedded_root(name) / "dataset.json").read_text())
    return {entry["name"]: entry["family"] for entry in described["subsets"]}
