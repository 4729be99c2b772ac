"""What others have published on MMEB-V2, and the file that its leaderboard takes.

`scores.csv`: hit@1 (video) and linear NDCG@5 (documents) of eight models, from the score files in
`experiments/public/all_scores` of the VLM2Vec repository (versions v2.0.1 and v2.1; the page sets from the corrected
ones); the image tasks are those of `mmeb_scores.csv`. `marks.csv`: means by modality that model cards and reports give,
newest first; each names the harness where it is known.
"""

from __future__ import annotations

import csv
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files
from typing import Any

from b3.errors import InputError
from b3.eval.benchmarks.mmeb import load_baselines
from b3.eval.benchmarks.mmeb_v2.table import MODALITIES, RENAMED, TASKS

NEW_NAMES = {old: new for new, old in RENAMED}


@cache
def _video_and_documents() -> dict[str, dict[str, float]]:
    columns: dict[str, dict[str, float]] = {}
    with (files("b3.eval.benchmarks.mmeb_v2") / "scores.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for model, value in list(row.items())[4:]:
                if value:
                    columns.setdefault(model, {})[row["task"]] = float(value)
    return columns


def published_scores() -> dict[str, dict[str, float]]:
    """The score of each task in its own metric, 0 to 1, by model and task."""
    image = load_baselines("v2.0.1")
    return {model: {**image.get(model, {}), **scores} for model, scores in _video_and_documents().items()}


def published_marks() -> list[dict[str, str]]:
    """Lines of marks.csv: model, date, harness, image, video, visdoc, all (percent, '' where unknown), source."""
    with (files("b3.eval.benchmarks.mmeb_v2") / "marks.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def leaderboard_json(summary: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """What to submit for a run, in the layout of VLM2Vec's `report_score_v2.py`.

    Each task that was not scored has its sentinel: "FILE_N/A", or "DIR_N/A" where its modality was not scored at all.
    The two page sets carry their new names.

    Args:
        summary: as `b3.eval.ranking_report.summary` gives it; its `metrics` hold the score files by task.
        metadata: `model_name` (needed), and `model_backbone`, `model_size`, `embedding_dimension`, `max_length_tokens`,
            `model_release_date`, `data_source`, `url` as far as known.

    Raises `InputError` if the name is missing.
    """
    if not metadata.get("model_name"):
        raise InputError("the leaderboard file needs a model name; give metadata with 'model_name'")
    scored: dict[str, dict[str, Any]] = summary["metrics"]
    metrics: dict[str, dict[str, Any]] = {}
    for modality in MODALITIES:
        names = [task.name for task in TASKS if task.modality == modality and task.is_counted]
        missing = "FILE_N/A" if any(name in scored for name in names) else "DIR_N/A"
        metrics[modality] = {NEW_NAMES.get(name, name): scored.get(name, missing) for name in names}
    date = datetime.now(timezone.utc).replace(tzinfo=None).isoformat()
    return {"metadata": {"report_generated_date": date, "data_source": "self-reported"} | metadata, "metrics": metrics}
