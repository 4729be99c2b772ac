"""What makes a run safe to kill: checkpoints that are visible only when complete, and a log without replays."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from b3 import files
from b3.files import sync, write_json, write_text

MARKER = "complete.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
STAGING = ".saving"
REMOVED = ".removed-"


def mark_complete(folder: Path, facts: dict[str, Any]) -> None:
    """Declare a checkpoint complete. Written last; `publish` puts it on disk with the rest."""
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    write_json(folder / MARKER, {**facts, "files": sizes})


def is_complete(folder: Path) -> bool:
    """Whether the marker exists and every file has the size it had then."""
    try:
        sizes = json.loads((folder / MARKER).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def publish(staged: Path, run: Path, facts: dict[str, Any]) -> Path:
    """Give a finished checkpoint its place: its files and its marker are on disk before its name is."""
    mark_complete(staged, facts)
    target, damaged = run / staged.name, run / f"{REMOVED}{staged.name}"
    shutil.rmtree(damaged, ignore_errors=True)
    if target.exists():  # it was passed over
        target.rename(damaged)
    files.publish(staged, target)
    return target


def prune(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and damaged ones that are older than the newest.

    A folder leaves its name before its files, so that a kill does not leave half of one under it.
    """
    found = sorted((p for p in run.glob("checkpoint-*") if _FOLDER.match(p.name)), key=checkpoint_step)
    kept = [p for p in found if is_complete(p)][-keep:]
    for folder in found:
        if kept and folder not in kept and checkpoint_step(folder) < checkpoint_step(kept[-1]):
            target = run / f"{REMOVED}{folder.name}"
            shutil.rmtree(target, ignore_errors=True)  # left by a kill
            folder.rename(target)
    for folder in run.glob(f"{REMOVED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What `publish` recorded: step, world size and whatever the trainer keeps there."""
    facts: dict[str, Any] = json.loads((folder / MARKER).read_text())
    return facts


def checkpoint_step(folder: Path) -> int:
    match = _FOLDER.match(folder.name)
    assert match is not None, folder
    return int(match[1])


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps; torn ones are passed over."""
    found = [p for p in run.glob("checkpoint-*") if _FOLDER.match(p.name) and is_complete(p)]
    return max(found, key=checkpoint_step, default=None)


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
    write_text(file, "".join(line + "\n" for line in kept))


def read_metrics(run: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that carry `kind`: "loss" for training, "evaluation" for evaluations on the way."""
    file = run / METRICS
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if kind in line]


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    with (run / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def sync_metrics(run: Path) -> None:
    """Put the log on disk, before a checkpoint relies on its lines."""
    file = run / METRICS
    if file.exists():
        sync(file)
