"""A jsonl file as Arrow tables of bounded size and one schema."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 1 << 24


def read_jsonl(file: Path) -> Iterator[pa.Table]:
    """The rows in blocks of some `BLOCK_BYTES`; a larger file is read twice, as the first pass finds the columns.

    Raises `DataError` naming a line that is no object, and pyarrow's errors for values that do not fit each other.
    """
    import pyarrow as pa
    import pyarrow.json

    tables, schemas = [], list[Any]()
    for block in _blocks(file):
        table = pa.json.read_json(pa.BufferReader(block))
        schema = pa.schema([(field.name, _with_texts(field.type)) for field in table.schema])
        tables = [table] if not schemas else []
        schemas.append(schema)
    if not schemas:
        raise DataError(f"{file} has no rows")
    whole = pa.unify_schemas(schemas, promote_options="permissive")
    if tables and tables[0].schema == whole:
        yield tables[0]
        return
    options = pa.json.ParseOptions(explicit_schema=whole)
    for block in _blocks(file):
        yield pa.json.read_json(pa.BufferReader(block), parse_options=options)


def _blocks(file: Path) -> Iterator[bytes]:
    """Whole lines. Raises `DataError` for one that is no JSON object: pyarrow crashes on some of them (null)."""
    number = 1
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        while lines := stream.readlines(BLOCK_BYTES):
            for line in lines:
                if line.lstrip()[:1] not in (b"{", b""):
                    start = line[:40].decode("utf-8", "replace").strip()
                    raise DataError(f"{file} line {number} is no JSON object ({start}); correct it or drop it")
                number += 1
            if block := b"".join(lines).strip():
                yield block


def _with_texts(kind: pa.DataType) -> pa.DataType:
    """A type with texts where pyarrow has read them as times."""
    import pyarrow as pa

    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_with_texts(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _with_texts(field.type)) for field in kind])
    return kind
