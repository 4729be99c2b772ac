"""What makes a run safe to kill: complete checkpoints, a log without replays, a folder that knows its run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from b3.config import Config, dump_config
from b3.errors import RunError
from b3.files import write_atomic

MARKER = "complete.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
# Keys that may change between the parts of an interrupted run.
_FREE_KEYS = {"resume", "train.workers", "train.save_every", "train.keep_checkpoints", "train.log_every"}


def mark_complete(folder: Path, facts: dict[str, Any]) -> None:
    """Declare a checkpoint complete, after syncing its files. Written last."""
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    write_atomic(folder / MARKER, json.dumps({**facts, "files": sizes}, indent=2) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether the marker exists and every file has the size it had then."""
    try:
        sizes = json.loads((folder / MARKER).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoint_step(folder: Path) -> int:
    match = _FOLDER.match(folder.name)
    assert match is not None, folder
    return int(match[1])


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps; torn ones are passed over."""
    found = [p for p in run.glob("checkpoint-*") if _FOLDER.match(p.name) and is_complete(p)]
    return max(found, key=checkpoint_step, default=None)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return result


def claim_folder(config: Config) -> None:
    """Write config.yaml into the run folder, or check that the run there is this one.

    Raises:
        RunError: the folder holds another run (the first difference is named), or a run although resume is 'never'.
    """
    run = Path(config.output_dir)
    file = run / "config.yaml"
    if not file.exists():
        if run.exists() and not run.is_dir():
            raise RunError(f"output_dir {run} is a file; choose another")
        if run.is_dir() and any(run.iterdir()):
            raise RunError(f"output_dir {run} is not empty and holds no run of b3; choose another or empty it")
        try:
            write_atomic(file, dump_config(config))
        except OSError as error:
            raise RunError(f"output_dir {run} cannot be written ({error.strerror})") from None
        return
    if config.resume == "never":
        raise RunError(f"output_dir {run} holds a run and resume is 'never'; choose another output_dir or delete it")
    here, there = _flat(config.model_dump(mode="json")), _flat(yaml.safe_load(file.read_text()))
    if here != there and not (run / METRICS).exists() and not list(run.glob("checkpoint-*")):
        write_atomic(file, dump_config(config))  # the earlier attempt failed before its first step
        return
    for key in sorted(here.keys() | there.keys()):
        if key not in _FREE_KEYS and here.get(key) != there.get(key):
            raise RunError(
                f"output_dir {run} belongs to another run ({key} was {there.get(key)!r}, now {here.get(key)!r});"
                " choose another output_dir or delete it"
            )


def rewind_metrics(run: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`, and a torn last line, so that a resumed run repeats none."""
    file = run / METRICS
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_atomic(file, "".join(line + "\n" for line in kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    file = run / METRICS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
