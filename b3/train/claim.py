"""Which run a folder belongs to (recipe and data of its first start), and what may differ when it is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from b3.config import Config, dump_config
from b3.errors import RunError
from b3.files import belongs_elsewhere, changes, claim, flat, write_json, write_text
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
    """SHA-256 over communities and hard negatives: equal digests, equal batches."""
    digest = hashlib.sha256()
    for array in (plan.communities, plan.hard_negatives):
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
        if not (run / DEBUG).is_file():
            claim(run, {}, "run of b3", "choose another output_dir or empty it", file=file.name)
        _write(config, data)
        return []
    if config.resume == "never":
        raise RunError(f"output_dir {run} holds a run and resume is 'never'; choose another output_dir or delete it")
    here, there = config.model_dump(mode="json"), yaml.safe_load(file.read_text())
    notes = []
    if (run / METRICS).exists() or list(run.glob("checkpoint-*")):
        notes = _compare(run, config, here, there)
        if data is not None:
            _compare_data(run, data)
    elif here == there and data is None:
        return []
    _write(config, data)  # also when the earlier attempt failed before its first step
    return notes


def _write(config: Config, data: dict[str, Any] | None) -> None:
    run = Path(config.output_dir)
    try:
        if data is not None:
            run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", dump_config(config))
        if data is not None:
            write_json(run / DATA, data)
    except OSError as error:
        raise RunError(f"output_dir {run} cannot be written ({error.strerror})") from None


def _compare(run: Path, config: Config, here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Notes on the differences that are allowed. Raises `RunError` with the others."""
    notes, refused = [], []
    old, new = flat(there), flat(here)
    for key, change in changes(there, here).items():
        if key in _FREE_KEYS or key.partition(".")[0] in _FREE_SECTIONS or key not in new:
            continue
        if key not in old and new[key] == flat(_defaults(config)).get(key):
            continue  # a key that this version has added, at its default
        if key in _ROUNDING_KEYS:
            notes.append(f"{change}: equal up to rounding, dropout is drawn anew")
        elif (
            key == "train.steps" and config.train.schedule == "constant" and config.train.steps > int(old.get(key) or 0)
        ):
            notes.append(f"{change}: a constant learning rate goes on as it was")
        else:
            refused.append(change)
    if refused:
        more = "; more steps need train.schedule constant" if refused[0].startswith("train.steps ") else ""
        raise belongs_elsewhere(run, "run", refused, "choose another output_dir or delete it" + more)
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
        raise belongs_elsewhere(run, "run", [what], "restore it or choose another output_dir")
