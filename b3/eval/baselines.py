"""Published per-subset results on MMEB, to compare a run with.

`mmeb_scores.csv` holds hit@1 (the same as precision@1) of eight models on MMEB's 36 image subsets, read from the score
files in `experiments/public/all_scores` of the VLM2Vec repository (https://github.com/TIGER-AI-Lab/VLM2Vec), a column a
model and version of the files (`model@v2.0.1`, `model@v2.0.0`). Its last rows, whose names start with AVG_, are means
over the rows above. Only numbers were taken; the cards of that project's models state the Apache License 2.0.

All numbers come from VLM2Vec's second evaluation code (local candidates, no target prefixes; V1 models with pictures
resized to 1344 x 1344). Results of other code lines are not comparable below about 0.5 points.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files

from b3.errors import InputError
from b3.eval.benchmarks.mmeb import FAMILIES, MMEB

VERSIONS = ("v2.0.1", "v2.0.0")


@cache
def _columns(version: str) -> dict[str, dict[str, float]]:
    known = {task.name for task in MMEB}
    columns: dict[str, dict[str, float]] = {}
    with (files("b3.eval") / "mmeb_scores.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["subset"] not in known:
                continue
            for column, value in row.items():
                model, _, label = column.partition("@")
                if label == version and value:
                    columns.setdefault(model, {})[row["subset"]] = float(value)
    return columns


def load_baselines(version: str = VERSIONS[0]) -> dict[str, dict[str, float]]:
    """Precision@1 (0 to 1) by model and subset, from the given version of the published score files."""
    if version not in VERSIONS:
        raise InputError(f"no published scores of version '{version}'; use one of {', '.join(VERSIONS)}")
    return {model: dict(scores) for model, scores in _columns(version).items()}


def family_means(scores: dict[str, float]) -> dict[str, float]:
    """Plain means over MMEB's subsets by family, 'IND', 'OOD' and 'overall'; only groups that `scores` covers in full.

    Subsets that are not MMEB's play no part.
    """
    groups: dict[str, list[str]] = {family: [t.name for t in MMEB if t.family == family] for family in FAMILIES}
    groups["IND"] = [task.name for task in MMEB if task.in_domain]
    groups["OOD"] = [task.name for task in MMEB if not task.in_domain]
    groups["overall"] = [task.name for task in MMEB]
    return {
        group: sum(scores[name] for name in names) / len(names)
        for group, names in groups.items()
        if all(name in scores for name in names)
    }
