"""Evaluations of the recorded MMEB-V2 folder by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_mmeb


def command(golden: Path, model: Path, out: Path, *more: str, subsets: list[str]) -> list[str]:
    return [
        "--benchmark", "mmeb_v2", "--model_name", str(model), "--normalize", "True", "--encode_output_path", str(out),
        "--dataset_name", str(golden / "hub"), "--data_basedir", str(golden / "data"), "--subset_name", *subsets, *more,
    ]  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def read_scores(golden: Path, model: Path, out: Path, tasks: list[str], *more: str) -> dict[str, Any]:
    assert eval_mmeb.main(command(golden, model, out, *more, subsets=tasks)) == 0
    return read(out / "summary.json")["metrics"]
