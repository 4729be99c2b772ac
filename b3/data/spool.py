"""Rows that are written once and read by number: in memory while they are few, then in a file that is mapped.

The file lies in the folder of temporary files (``TMPDIR``) and has no name once it is complete, so it goes with the
process that made it.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_ROWS = 4096
MEMORY_BYTES = 1 << 26  # a table beyond this lies in a file


class Spool:
    """Collects the rows of an Arrow table.

    Args:
        schema: of the table.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []
        self._num_bytes = 0
        self._file: str | None = None
        self._writer: Any = None

    def add(self, *row: Any) -> None:
        """One row, a value for each column. Raises pyarrow's errors for a value that does not fit."""
        self._rows.append(row)
        if len(self._rows) == BLOCK_ROWS:
            self._settle()

    def _settle(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(values, kind) for values, kind in zip(columns, self.schema.types, strict=True)]
        self._rows = []
        self._take(pa.record_batch(arrays, self.schema))

    def extend(self, table: pa.Table) -> None:
        """All rows of a table of this schema."""
        self._settle()
        for batch in table.combine_chunks().to_batches():
            self._take(batch)

    def _take(self, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        if self._writer is None:
            self._batches.append(batch)
            self._num_bytes += batch.nbytes
            if self._num_bytes > MEMORY_BYTES:
                handle, self._file = tempfile.mkstemp(prefix="b3-rows-", suffix=".arrow")
                os.close(handle)
                self._writer = pa.ipc.new_file(self._file, self.schema)
                for early in self._batches:
                    self._writer.write_batch(early)
                self._batches = []
        else:
            self._writer.write_batch(batch)

    def table(self) -> pa.Table:
        """All rows; nothing can be added after that."""
        import pyarrow as pa

        self._settle()
        if self._writer is None:
            return pa.Table.from_batches(self._batches, self.schema)
        self._writer.close()
        return pa.ipc.open_file(pa.memory_map(self._file)).read_all()

    def close(self) -> None:
        """Take the file's name away; a table that maps it stays as it is."""
        if self._file is not None:
            os.unlink(self._file)
            self._file = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
