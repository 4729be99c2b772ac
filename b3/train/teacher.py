"""A teacher's vectors of a data set, read row by row while training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from b3.errors import DataError


@dataclass(frozen=True)
class TeacherVectors:
    """Two memory-mapped .npy files: `queries` (N, D) and `targets` (N, D) of the same rows, any float type.

    float16 is enough and halves what is read. Only the paths travel to worker processes.
    """

    query_file: Path
    target_file: Path

    @classmethod
    def open(cls, query_file: str | Path, target_file: str | Path, num_rows: int) -> TeacherVectors:
        """Raises `DataError` if a file is missing, no (N, D) array of numbers, or of another number of rows."""
        found = cls(Path(query_file), Path(target_file))
        for file in (found.query_file, found.target_file):
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"teacher vectors {file} cannot be read ({error}); encode the data set again") from None
            if array.ndim != 2 or array.dtype.kind != "f" or len(array) != num_rows:
                raise DataError(
                    f"teacher vectors {file} are {array.dtype} of shape {array.shape}; expected floats, {num_rows} rows"
                )
        if found.queries.shape != found.targets.shape:
            raise DataError(f"teacher vectors {query_file} and {target_file} differ in length")
        return found

    @cached_property
    def queries(self) -> np.ndarray:
        return np.load(self.query_file, mmap_mode="r", allow_pickle=False)

    @cached_property
    def targets(self) -> np.ndarray:
        return np.load(self.target_file, mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"query_file": self.query_file, "target_file": self.target_file}
