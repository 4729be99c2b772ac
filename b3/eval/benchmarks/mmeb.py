"""MMEB's 36 image subsets, published scores on them, and the file that its leaderboard takes.

10 classification, 10 VQA, 12 retrieval, 4 visual grounding; 20 in domain (IND: their data set was trained on), 16 out
(OOD). The overall number is the plain mean over subsets (paper, section 5).

`mmeb_scores.csv` holds hit@1 (the same as precision@1) of eight models, read from the score files in
`experiments/public/all_scores` of the VLM2Vec repository (https://github.com/TIGER-AI-Lab/VLM2Vec), a column per model
and version of the files (`model@v2.0.1`, `model@v2.0.0`). Its last rows, whose names start with AVG_, are means over
the rows above. Only numbers were taken; the cards of that project's models state the Apache License 2.0. All come from
VLM2Vec's second evaluation code (local candidates, no target prefixes; V1 models with images resized to 1344 x 1344).
Results of other code lines are not comparable below about 0.5 points.
"""

from __future__ import annotations

import csv
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from typing import Any

from b3.errors import InputError
from b3.eval.benchmark import Benchmark, Task

_MMEB = {
    "Classification": (
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    "VQA": ("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA VizWiz GQA TextVQA"),
    "Retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    ),
    "Visual grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
}
TASKS = tuple(
    Task(name, family, in_domain)
    for family, both in _MMEB.items()
    for in_domain, names in zip((True, False), both, strict=True)
    for name in names.split()
)
VERSIONS = ("v2.0.1", "v2.0.0")


@cache
def _columns(version: str) -> dict[str, dict[str, float]]:
    known = {task.name for task in TASKS}
    columns: dict[str, dict[str, float]] = {}
    with (files("b3.eval.benchmarks") / "mmeb_scores.csv").open(encoding="utf-8") as file:
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


def leaderboard_json(
    summary: dict[str, Any], metadata: dict[str, Any], rows: dict[str, int] | None = None
) -> dict[str, Any]:
    """What to submit for a run, ready for `json.dump`, in the layout of VLM2Vec's files (read from version 2.0.1).

    The published files also give hit@5, NDCG and others; the image tables are made of hit@1. No video and no documents
    are scored here: those two are empty.

    Args:
        summary: as of `b3.eval.report.summarise`; subsets that are not MMEB's are left out.
        metadata: `model_name` (needed) and what else is known, such as `model_size`, `url`, `model_backbone`.
            `report_generated_date` is added where missing.
        rows: number of rows by subset, for `num_pred` and `num_data`.

    Raises `InputError` if the name is missing or no subset of MMEB was scored.
    """
    if not metadata.get("model_name"):
        raise InputError("the leaderboard file needs a model name; give metadata with 'model_name'")
    image: dict[str, dict[str, float | int]] = {}
    for task in TASKS:
        if task.name not in summary["subsets"]:
            continue
        image[task.name] = {"hit@1": float(summary["subsets"][task.name])}
        if rows is not None and task.name in rows:
            image[task.name] |= {"num_pred": rows[task.name], "num_data": rows[task.name]}
    if not image:
        raise InputError("the leaderboard takes MMEB's subsets and none of them was scored")
    date = datetime.now(timezone.utc).replace(tzinfo=None).isoformat()
    return {
        "metadata": {"report_generated_date": date} | metadata,
        "metrics": {"image": image, "video": {}, "visdoc": {}},
    }


MMEB = Benchmark("mmeb", TASKS, "TIGER-Lab/MMEB-eval", published=load_baselines, leaderboard=leaderboard_json)
