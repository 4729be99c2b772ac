"""Rows of other programs as training pairs: `data.format`.

mmeb: the columns that the rest of the system reads. triplets: hard negatives as sentence-transformers writes them, by
the order of the columns (anchor, positive, negatives). swift: ms-swift's rows for embedding models
(docs/source_en/BestPractices/Embedding.md of modelscope/ms-swift). tevatron: rows with passages inside. A row with
several positives becomes as many rows; the loss masks targets of an equal query. llava_hound_*, vidore, visrag:
`b3.data.mixes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from b3.data import mixes
from b3.data.tables import blocks_of
from b3.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("mmeb", "triplets", "swift", "tevatron", *mixes.FORMS)
EXAMPLES: dict[str, list[dict[str, Any]]] = {  # rows that are read, shown where one is not
    "mmeb": [
        {"qry": "<|image_1|>\nWhat is it?", "qry_image_path": "a.jpg", "pos_text": "a cat", "pos_image_path": ""},
    ],
    "triplets": [{"anchor": "a cat", "positive": "a small cat", "negative_1": "a dog", "negative_2": "a car"}],
    "swift": [
        {
            "messages": [{"role": "user", "content": "<image>What is it?"}],
            "images": ["a.jpg"],
            "positive_messages": [[{"role": "user", "content": "a cat"}]],
            "negative_messages": [[{"role": "user", "content": "<image>a dog"}]],
            "negative_images": [["b.jpg"]],
        }
    ],
    "tevatron": [
        {
            "query_id": "1",
            "query": "a cat",
            "positive_passages": [{"docid": "7", "title": "Cats", "text": "A small cat."}],
            "negative_passages": [{"docid": "9", "title": "Dogs", "text": "A dog."}],
        }
    ],
    **mixes.EXAMPLES,
}
LABELS = ("label", "labels", "score", "scores")
Side = tuple[str, tuple[str, ...]]  # text and image paths
Pair = tuple[Side, Side, list[Side]]  # query, target, negatives


def to_pairs(table: pa.Table, form: str, where: str, first: int = 0) -> pa.Table:
    """A table of `form` in the columns of mmeb. Raises `DataError` naming the first row that does not fit.

    first: the number of the table's first row.
    """
    if form == "mmeb":
        return table

    def unfit(row: int, error: Exception) -> DataError:
        what = f"no key {error}" if isinstance(error, KeyError) else str(error)
        example = json.dumps(EXAMPLES[form][0], ensure_ascii=False)
        return DataError(f"{where}: row {row}: {what}; a row of format {form}: {example}")

    if form in mixes.FORMS:
        return mixes.to_columns(table, form, unfit, first)
    parts, row = [], first
    for block in blocks_of(table):
        pairs: list[Pair] = []
        for record in block.to_pylist():
            try:
                pairs += READERS[form](record)
            except (_Unfit, KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
                raise unfit(row, error) from None
            row += 1
        parts.append(_table(pairs))
    return one_table(parts)


def _table(pairs: list[Pair]) -> pa.Table:
    """Pairs in the columns of mmeb."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        "qry": [query[0] for query, _, _ in pairs],
        "qry_image_path": _paths([query for query, _, _ in pairs]),
        "pos_text": [target[0] for _, target, _ in pairs],
        "pos_image_path": _paths([target for _, target, _ in pairs]),
    }
    if any(negatives for _, _, negatives in pairs):
        every = iter(_paths([one for _, _, negatives in pairs for one in negatives]))
        columns["neg_text"] = [[text for text, _ in negatives] for _, _, negatives in pairs]
        columns["neg_image_path"] = [[next(every) for _ in negatives] for _, _, negatives in pairs]
    return pa.table({name: pa.array(values, _kind(name, values)) for name, values in columns.items()})


def one_table(parts: list[pa.Table]) -> pa.Table:
    """Tables of the columns of mmeb one after another; where one has lists and another texts, all have lists."""
    import pyarrow as pa

    if len(parts) == 1:
        return parts[0]
    kinds: dict[str, Any] = {}
    for part in parts:
        for field in part.schema:
            known = kinds.setdefault(field.name, field.type)
            kinds[field.name] = max(known, field.type, key=lambda kind: (_depth(kind), "null" not in str(kind)))
    whole = []
    for part in parts:
        columns = {}
        for name, kind in kinds.items():
            if name not in part.column_names:
                columns[name] = pa.array([[] if pa.types.is_nested(kind) else ""] * len(part), kind)
            elif _depth(part[name].type) == _depth(kind):
                columns[name] = part[name].cast(kind)
            else:
                columns[name] = pa.array([_as_lists(cell) for cell in part[name].to_pylist()], kind)
        whole.append(pa.table(columns))
    return pa.concat_tables(whole)


def _depth(kind: pa.DataType) -> int:
    """How many lists are within each other."""
    return str(kind).count("list")


def _as_lists(cell: Any) -> list[Any]:
    """A path, or each one in a list, as the list of one; '' as an empty list."""
    return [_as_lists(one) for one in cell] if isinstance(cell, list) else [cell] if cell else []


def _paths(sides: list[Side]) -> list[Any]:
    """A path or '' for each, or a list of paths for each where one has several."""
    if all(len(paths) < 2 for _, paths in sides):
        return [paths[0] if paths else "" for _, paths in sides]
    return [list(paths) for _, paths in sides]


def _kind(name: str, values: list[Any]) -> Any:
    """The Arrow type of a column: texts, lists of them, or lists of lists."""
    import pyarrow as pa

    inner = [one for value in values for one in value] if name.startswith("neg_") else values
    kind = pa.list_(pa.string()) if any(isinstance(value, list) for value in inner) else pa.string()
    return pa.list_(kind) if name.startswith("neg_") else kind


class _Unfit(Exception):
    """Why a row does not fit."""


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Unfit(f"'{name}' is {'missing' if value is None else type(value).__name__}, a text is needed")
    return value


def _triplets(record: dict[str, Any]) -> Iterator[Pair]:
    labels = [name for name in LABELS if name in record]
    if labels:
        raise _Unfit(
            f"a column '{labels[0]}' makes pairs of any degree, not positives; keep the rows that are positive"
        )
    if len(record) < 2:
        raise _Unfit("an anchor and a positive are needed")
    (anchor, query), (positive, target), *others = record.items()
    values = [(name, one) for name, value in others for one in (value if isinstance(value, list) else [value])]
    negatives: list[Side] = [(_text(value, name), ()) for name, value in values if value is not None]
    yield (_text(query, anchor), ()), (_text(target, positive), ()), negatives


def _swift(record: dict[str, Any]) -> Iterator[Pair]:
    foreign = [name for name in record if re.search("videos$|audios$", name) and record[name]]
    if foreign:
        raise _Unfit(f"'{foreign[0]}' is not read; texts and images are")
    if record.get("label") not in (None, 1, 1.0):
        raise _Unfit(f"label {record['label']} makes no positive; keep rows of label 1")
    query = _messages(record["messages"], record.get("images"))
    positives, negatives = (_list_of_messages(record, side) for side in ("positive", "negative"))
    if not positives:
        raise _Unfit("no positive_messages")
    for positive in positives:
        yield query, positive, negatives


def _list_of_messages(record: dict[str, Any], side: str) -> list[Side]:
    groups, images = record.get(f"{side}_messages") or [], record.get(f"{side}_images") or []
    if images and len(images) != len(groups):
        raise _Unfit(f"{len(groups)} {side}_messages and {len(images)} {side}_images")
    return [_messages(group, images[i] if images else None) for i, group in enumerate(groups)]


def _messages(messages: list[dict[str, Any]], images: Any) -> Side:
    """Contents joined by spaces, as ms-swift puts a system message before the user's; images in our notation."""
    strange = [str(m["role"]) for m in messages if m["role"] not in ("system", "user")]
    if strange:
        raise _Unfit(f"role '{strange[0]}' has no place in what is embedded; keep system and user")
    text = " ".join(_text(message["content"], "content") for message in messages)
    paths = [image.get("path") if isinstance(image, dict) else image for image in images or []]
    if text.count("<image>") != len(paths):
        raise _Unfit(f"{text.count('<image>')} <image> in the text and {len(paths)} images")
    pieces = text.split("<image>")
    marked = "".join(f"{piece}<|image_{number}|>\n" for number, piece in enumerate(pieces[:-1], 1)) + pieces[-1]
    return marked, tuple(_text(path, "images") for path in paths)


def _tevatron(record: dict[str, Any]) -> Iterator[Pair]:
    if "positive_document_ids" in record and "positive_passages" not in record:
        raise _Unfit("positive_document_ids point into a corpus that is not here; put the passages into the rows")
    query: Side = (_text(record["query"], "query"), ())
    positives, negatives = (
        [_passage(one) for one in record.get(f"{side}_passages") or []] for side in ("positive", "negative")
    )
    if not positives:
        raise _Unfit("no positive_passages")
    for positive in positives:
        yield query, positive, negatives


def _passage(passage: Any) -> Side:
    """Title and text joined by a space, as Tevatron joins them."""
    if isinstance(passage, str):
        return passage, ()
    title, text = passage.get("title"), _text(passage["text"], "text")
    return f"{title} {text}" if title else text, ()


READERS: dict[str, Callable[[dict[str, Any]], Iterator[Pair]]] = {
    "triplets": _triplets,
    "swift": _swift,
    "tevatron": _tevatron,
}
