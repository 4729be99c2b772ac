"""Whose run a folder holds: the recipe and the data of its first start, and which differences a resume may have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from b3.config import Config, dump_config
from b3.errors import RunError
from b3.files import write_text
from b3.train.checkpoint import METRICS

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan

DATA = "data.json"
DEBUG = "debug.json"  # the folder of a debug run holds its model and plans before it starts
# Keys that may change between the parts of a run: they decide nothing about its weights.
_FREE_KEYS = {
    "resume", "train.workers", "train.save_every", "train.keep_checkpoints", "train.log_every", "train.trackers",
    "train.save_merged", "train.timeout_minutes",
}  # fmt: skip
_FREE_SECTIONS = ("eval",)
# Keys that leave the gradient what it is up to rounding (and draw dropout anew): allowed, and said.
_ROUNDING_KEYS = {
    "train.chunk_tokens",
    "model.attention",
    "model.gradient_checkpointing",
    "model.shard",
    "train.vision_cache_mib",
}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return result


def data_facts(datasets: list[PairDataset], plans: list[BatchPlan]) -> dict[str, Any]:
    """What the batches are made of: rows and fingerprint of each data set, and a digest of each plan's arrays."""
    facts: dict[str, Any] = {}
    for index, dataset in enumerate(datasets):
        facts[dataset.name] = {
            "rows": len(dataset),
            "fingerprint": dataset.fingerprint(),
            "plan": plan_digest(plans[index]) if plans else None,
        }
    return facts


def plan_digest(plan: BatchPlan) -> str:
    """SHA-256 over communities and hard negatives, or what these are drawn from: equal digests, equal batches."""
    digest = hashlib.sha256()
    for array in (plan.communities, plan.hard_negatives, plan.candidates, plan.candidate_scores):
        if array is not None:
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def claim_folder(config: Config, data: dict[str, Any] | None = None) -> list[str]:
    """Write config.yaml (and data.json) into the run folder, or check that the run there is this one.

    Args:
        config: the recipe.
        data: from `data_facts`; None when there is nothing left to train.

    Returns:
        The differences that were allowed and matter, a line each.

    Raises:
        RunError: the folder holds another run (the difference is named), or a run although resume is 'never'.
    """
    run = Path(config.output_dir)
    file = run / "config.yaml"
    if not file.exists():
        _check_fresh(run)
        _write(config, data)
        return []
    if config.resume == "never":
        raise RunError(f"output_dir {run} holds a run and resume is 'never'; choose another output_dir or delete it")
    here, there = _flat(config.model_dump(mode="json")), _flat(yaml.safe_load(file.read_text()))
    notes = []
    if (run / METRICS).exists() or list(run.glob("checkpoint-*")):
        notes = _compare(run, config, here, there)
        if data is not None:
            _compare_data(run, data)
    elif here == there and data is None:
        return []
    _write(config, data)  # also when the earlier attempt failed before its first step
    return notes


def _check_fresh(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise RunError(f"output_dir {run} is a file; choose another")
    if run.is_dir() and any(run.iterdir()) and not (run / DEBUG).is_file():
        raise RunError(f"output_dir {run} is not empty and holds no run of b3; choose another or empty it")


def _write(config: Config, data: dict[str, Any] | None) -> None:
    run = Path(config.output_dir)
    try:
        if data is not None:
            run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", dump_config(config))
        if data is not None:
            write_text(run / DATA, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"output_dir {run} cannot be written ({error.strerror})") from None


def _compare(run: Path, config: Config, here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Notes on the differences that are allowed. Raises `RunError` with the others."""
    notes, refused = [], []
    for key in sorted(here.keys() | there.keys()):
        old, new = there.get(key), here.get(key)
        if old == new or key in _FREE_KEYS or key.partition(".")[0] in _FREE_SECTIONS or key not in here:
            continue
        if key not in there and new == _flat(_defaults(config)).get(key):
            continue  # a key that this version has added, at its default
        change = f"{key} was {old!r}, now {new!r}"
        if key in _ROUNDING_KEYS:
            notes.append(f"{change}: equal up to rounding, dropout is drawn anew")
        elif key == "train.steps" and config.train.schedule == "constant" and config.train.steps > int(old or 0):
            notes.append(f"{change}: a constant learning rate goes on as it was")
        else:
            refused.append(change)
    if refused:
        shown = "; ".join(refused[:3]) + (f"; and {len(refused) - 3} more" if len(refused) > 3 else "")
        raise RunError(
            f"output_dir {run} belongs to another run ({shown}); choose another output_dir or delete it"
            + ("; more steps need train.schedule constant" if refused[0].startswith("train.steps ") else "")
        )
    return notes


def _defaults(config: Config) -> dict[str, Any]:
    """The recipe with only what it must say, everything else at its default."""
    tree = config.model_dump(mode="json")
    result: dict[str, Any] = {}
    for name, section in config:
        fields = getattr(type(section), "model_fields", {})
        result[name] = {
            key: tree[name][key] if field.is_required() else field.get_default(call_default_factory=True)
            for key, field in fields.items()
        }
    return result


def _compare_data(run: Path, data: dict[str, Any]) -> None:
    """Raise `RunError` naming the first data set whose rows or plan are not those of the earlier part."""
    file = run / DATA
    if not file.exists():
        return
    known = json.loads(file.read_text())
    for name, facts in data.items():
        old = known.get(name, {})
        if facts["rows"] != old.get("rows"):
            what = f"data set {name} had {old.get('rows')} rows, now {facts['rows']}"
        elif facts["fingerprint"] != old.get("fingerprint"):
            what = f"the rows of data set {name} have changed: {old['fingerprint'][:12]} to {facts['fingerprint'][:12]}"
        elif facts["plan"] != old.get("plan"):
            what = f"the batch plan of data set {name} is another one than that of the first start"
        else:
            continue
        raise RunError(f"output_dir {run} belongs to another run ({what}); restore it or choose another output_dir")
