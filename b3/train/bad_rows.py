"""Rows whose images cannot be read: named, and either the end of the run or replaced by other rows and counted.

A collator meets such a row in a worker, in the middle of a batch. `GuardedCollator` then looks for the rows to blame.
Under the policy "replace" each gives its place to another row of its data set, drawn by a hash of (seed, data set,
row), so that the batch is the same in every run, for any number of ranks, and after every resume; should that row be in
the batch already, the mask of duplicates sees to it. A row is replaced as well when one of its hard negatives cannot be
read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.errors import DataError
from b3.train.checkpoint import append_log, read_log

if TYPE_CHECKING:
    from b3.train.inputs import StepCollator, StepInputs, StepRow

BAD_ROWS = "bad_rows.jsonl"


@dataclass(frozen=True, slots=True)
class Replaced:
    """A row that could not be read: where, why, and which row of the same data set took its place."""

    data_set: str
    row: int
    replaced_by: int
    problem: str


@dataclass(frozen=True)
class GuardedCollator:
    """Calls the collator; where that fails, names or replaces the rows to blame.

    Args:
        collator: what builds the inputs.
        replace: whether rows with unreadable images are replaced; else they raise.
        seed: of the draw of the replacements.
    """

    collator: StepCollator
    replace: bool = False
    seed: int = 0

    def __call__(self, rows: list[StepRow]) -> tuple[StepInputs, list[Replaced]]:
        """Inputs of rows, and what was replaced. Raises `DataError` naming data set, row and file."""
        try:
            return self.collator(rows), []
        except DataError as error:
            original = error
        readable, replaced = list(rows), []
        for position, (dataset, row) in enumerate(rows):
            problem = self._problem(dataset, row)
            if problem is not None:
                other = self._other(dataset, row)
                readable[position] = dataset, other
                replaced.append(Replaced(self._name(dataset), row, other, problem))
        if not replaced:
            raise original
        return self.collator(readable), replaced

    def describe(self, rows: list[StepRow]) -> str:
        """Which rows a batch reads, for errors."""
        names = [f"{self._name(dataset)} {self._row(dataset, row)}" for dataset, row in rows[:5]]
        return f"{len(rows)} rows: {', '.join(names)}" + (", ..." if len(rows) > 5 else "")

    def _name(self, dataset: int) -> str:
        return self.collator.datasets[dataset].name

    def _row(self, dataset: int, row: int) -> str:
        return self.collator.datasets[dataset].where(row)

    def _problem(self, dataset: int, row: int) -> str | None:
        """Why a row cannot be used, or None. Raises `DataError` if that is not to be replaced."""
        pairs = self.collator.datasets[dataset]
        for item in (pairs.query(row), pairs.target(row), *self.collator.negative_items((dataset, row))):
            if item is None:
                continue
            try:
                self.collator.processor(item)
            except DataError as error:
                if not self.replace or not item.media:
                    remedy = ", or set data.bad_images: replace" if item.media else ""
                    raise DataError(f"{self._name(dataset)} {self._row(dataset, row)}: {error}{remedy}") from None
                return str(error)
        return None

    def _other(self, dataset: int, row: int) -> int:
        """A readable row in place of this one, whatever else is in the batch: a rank knows only its share of it."""
        count = len(self.collator.datasets[dataset])
        for attempt in range(4 * count):
            digest = hashlib.sha256(f"{self.seed}/{dataset}/{row}/{attempt}".encode()).digest()
            other = int.from_bytes(digest[:8], "big") % count
            if self._problem(dataset, other) is None:
                return other
        name = self._name(dataset)
        raise DataError(f"{name} row {row} cannot be read, and no other row of {name} can take its place")


class BadRows:
    """The replaced rows of the run so far, of all ranks; known to every rank, written by the first."""

    def __init__(self, run: Path, step: int) -> None:
        self.file = run / BAD_ROWS
        self.lines = [line for line in read_log(self.file) if line["step"] <= step]

    def add(self, step: int, replaced: list[dict[str, Any]], write: bool) -> None:
        lines = [{"step": step, **entry} for entry in replaced]
        self.lines += lines
        if write:
            append_log(self.file, *lines)

    def __len__(self) -> int:
        """Distinct rows."""
        return len({(line["data_set"], line["row"]) for line in self.lines})
