"""The JSON that the MMEB leaderboard takes for a model.

Layout of the files in VLM2Vec's `experiments/public/all_scores` (read from those of version 2.0.1):

    {"metadata": {"model_name": ..., "report_generated_date": ..., ...},
     "metrics": {"image": {subset: {"hit@1": 0.775, ..., "num_pred": 1000, "num_data": 1000}, ...},
                 "video": {...}, "visdoc": {...}}}

The published files also give hit@5, NDCG and others; the image tables are made of hit@1. This program scores no video
and no documents: those two are empty.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from b3.errors import InputError
from b3.eval.benchmarks.mmeb import MMEB


def leaderboard_json(
    summary: dict[str, Any], metadata: dict[str, Any], rows: dict[str, int] | None = None
) -> dict[str, Any]:
    """What to submit for a run, ready for `json.dump`.

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
    for task in MMEB:
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
