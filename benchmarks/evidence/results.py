"""What the runs gave, in two committed files, and the statistics of it.

evidence.json: the runs by key and, for each question, (labels, seed, key). evidence.npz: for each key the uint16 ranks
of all held-out queries, data set after data set. The measure is the mean over data sets of the mean reciprocal rank, or
of precision@1 (the share of ranks that are 0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.grid import Run

DRAWS = 2000
VALIDATION = "validation"  # name of the rows on which settings are chosen


@dataclass(frozen=True)
class Cell:
    """The runs of one setting, one a seed. values: (seeds, queries) per-query measure. weights: (queries,), sum 1."""

    records: list[dict[str, Any]]
    values: np.ndarray
    weights: np.ndarray

    @property
    def by_seed(self) -> np.ndarray:
        means: np.ndarray = self.values @ self.weights
        return means

    @property
    def mean(self) -> float:
        return float(self.by_seed.mean())

    @property
    def sd(self) -> float:
        """Standard deviation over seeds (n - 1); 0 for one seed."""
        return float(self.by_seed.std(ddof=1)) if len(self.records) > 1 else 0.0

    def fact(self, name: str) -> float:
        """Mean over seeds of something recorded beside the score; nan where it is missing."""
        found = [record["facts"].get(name, record.get(name)) for record in self.records]
        return float("nan") if None in found else float(np.mean(found))


def difference(cell: Cell, control: Cell, draws: int = DRAWS, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of the paired difference: percentile interval of a bootstrap over seeds and queries.

    Seeds and queries are drawn with replacement, the same for both; a query counts with its data set's weight.
    """
    pairs = [
        (i, j)
        for i, own in enumerate(cell.records)
        for j, other in enumerate(control.records)
        if own["seed"] == other["seed"]
    ]
    assert pairs, "no seed in common"
    own, other = (list(side) for side in zip(*pairs, strict=True))
    delta = (cell.values[own] - control.values[other]) * cell.weights * len(cell.weights)
    by_query, by_seed = _resampled(*delta.shape, draws)
    drawn = ((by_query @ delta.T) * by_seed).sum(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(delta.mean()), float(low), float(high)


@lru_cache(maxsize=4)
def _resampled(seeds: int, queries: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of queries (draws, queries) and of seeds (draws, seeds) in each draw."""
    random = np.random.default_rng(0)
    by_query = random.multinomial(queries, np.full(queries, 1 / queries), size=draws) / queries
    return by_query, random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds


class Results:
    """Reads the two files."""

    def __init__(self, file: Path) -> None:
        tree = json.loads(file.read_text())
        self.runs: dict[str, dict[str, Any]] = tree["runs"]
        self.questions: dict[str, list[tuple[dict[str, Any], int, str]]] = tree["questions"]
        self.machine: str = tree["machine"]
        self.ranks = dict(np.load(file.with_suffix(".npz")))

    def values_of(self, question: str, axis: str) -> list[Any]:
        """Values of an axis in a question: numbers by size, others in the order of the grid."""
        found = list(dict.fromkeys(labels.get(axis) for labels, _, _ in self.questions[question]))
        return sorted(found) if all(isinstance(value, (int, float)) for value in found) else found

    def cell(self, question: str, precision: bool = False, part: str | None = None, **wanted: Any) -> Cell | None:
        """The runs of a question with these labels, by seed; None if there are none.

        Where several settings have them, the one without further labels counts.

        Args:
            part: one data set; "validation": the validation rows; None: the test rows of all data sets.
        """
        chosen: dict[int, list[tuple[int, str]]] = {}
        for labels, seed, key in self.questions[question]:
            if all(labels.get(axis) == value for axis, value in wanted.items()) and key in self.runs:
                chosen.setdefault(len(labels), []).append((seed, key))
        if not chosen:
            return None
        plainest = sorted(chosen[min(chosen)])
        assert len({seed for seed, _ in plainest}) == len(plainest), f"{question} {wanted} is several settings"
        records = [self.runs[key] for _, key in plainest]
        return cell_of(records, [self.ranks[record["key"]] for record in records], precision, part)


def cell_of(
    records: list[dict[str, Any]], ranks: Sequence[np.ndarray], precision: bool = False, part: str | None = None
) -> Cell:
    """The cell of some runs of one setting and their ranks; `part` as of `Results.cell`."""
    counts: dict[str, int] = records[0]["queries"]
    kept = [name == part or (part in (None, VALIDATION) and _split(name) == (part or "test")) for name in counts]
    sizes = [n for n, keep in zip(counts.values(), kept, strict=True) if keep]
    chosen = np.stack(ranks)[:, np.repeat(kept, list(counts.values()))].astype(np.float64)
    values = (chosen == 0).astype(np.float64) if precision else 1 / (1 + chosen)
    return Cell(records, values, np.repeat([1 / (n * len(sizes)) for n in sizes], sizes))


def _split(name: str) -> str:
    """Which rows a list of ranks is of."""
    return VALIDATION if name.startswith(f"{VALIDATION}/") else "test"


def collect(root: Path, questions: Mapping[str, list[Run]], file: Path, machine: str) -> int:
    """Write the two files from the results below `root`; returns how many runs of the grid have none.

    A run without result below `root` that an existing file has stays as it is there, and so do its rows of settings
    that the grid no longer has (options that are gone).
    """
    before = Results(file) if file.exists() else None
    runs: dict[str, Any] = {}
    ranks: dict[str, np.ndarray] = {}
    places: dict[str, list[Any]] = {}
    missing = 0
    for name, listed in questions.items():
        places[name] = []
        for run in listed:
            key = run.key
            found = root / "results" / f"{key}.json"
            if not found.exists():
                if before is None or key not in before.runs:
                    missing += 1
                    continue
                runs[key], ranks[key] = before.runs[key], before.ranks[key]
            elif key not in runs:
                arrays = np.load(found.with_suffix(".npz"))
                ranks[key] = np.concatenate([arrays[part] for part in arrays.files])
                runs[key] = {**_rounded(json.loads(found.read_text())), "queries": {p: len(arrays[p]) for p in arrays}}
            places[name].append([dict(run.labels), run.seed, key])
    if before is not None:
        _keep_recorded(before, questions, runs, ranks, places)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(runs[key])}" for key in sorted(runs)]
    listing = [
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(place)}" for place in placed) + "\n  ]"
        for name, placed in places.items()
    ]
    file.write_text(
        f'{{"machine": {json.dumps(machine)},\n "runs": {{\n'
        + ",\n".join(lines)
        + '\n },\n "questions": {\n'
        + ",\n".join(listing)
        + "\n }}\n"
    )
    np.savez_compressed(file.with_suffix(".npz"), **{key: ranks[key] for key in sorted(ranks)})
    return missing


def _keep_recorded(
    before: Results,
    questions: Mapping[str, list[Run]],
    runs: dict[str, Any],
    ranks: dict[str, np.ndarray],
    places: dict[str, list[Any]],
) -> None:
    """Add to runs, ranks and places what is recorded of settings that are not in the grid."""
    for name, rows in before.questions.items():
        present = [(dict(run.labels), run.seed) for run in questions.get(name, [])]
        for labels, seed, key in rows:
            if name in places and (labels, seed) not in present:
                places[name].append([labels, seed, key])
                runs.setdefault(key, before.runs[key])
                ranks.setdefault(key, before.ranks[key])


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Floats to five significant digits."""
    return json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.5g}"))
