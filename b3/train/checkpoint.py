"""What makes a run safe to kill: checkpoints visible only when complete, a log without replays, one run per folder.

A checkpoint holds safetensors and JSON only: the weights with all that loads them; optimizer.safetensors, the moments
of each trained parameter by its name; random.json, the random states of each rank as integers; and complete.json, the
step and what the log has gathered since its last line. The learning rate is a function of the step. config.yaml and
data.json say which run a folder belongs to, `claim_folder` which one may continue it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from b3 import files
from b3.config import Config, dump_config
from b3.errors import RunError
from b3.files import belongs_elsewhere, changes, claim, flat, sync, write_json, write_text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan

MARKER = "complete.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
MOMENTS = "optimizer.safetensors"
RANDOM = "random.json"
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
STAGING = ".saving"
REMOVED = ".removed-"
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


def stage(run: Path, step: int) -> Path:
    """An empty folder, out of sight, for the checkpoint of a step."""
    shutil.rmtree(run / STAGING, ignore_errors=True)  # a torn one of an earlier attempt
    folder = run / STAGING / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    return folder


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
    staged.parent.rmdir()
    return target


def prune(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and damaged ones that are older than the newest.

    A folder leaves its name before its files, so that a kill does not leave half of one under it.
    """
    folders = sorted((p for p in run.glob("checkpoint-*") if _FOLDER.match(p.name)), key=checkpoint_step)
    complete = [p for p in folders if is_complete(p)][-keep:]
    for folder in folders:
        if complete and folder not in complete and checkpoint_step(folder) < checkpoint_step(complete[-1]):
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
    folders = [p for p in run.glob("checkpoint-*") if _FOLDER.match(p.name) and is_complete(p)]
    return max(folders, key=checkpoint_step, default=None)


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


def save_moments(folder: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Write what the optimiser knows of each parameter, as KIND/NAME: exp_avg, exp_avg_sq and the number of steps."""
    from safetensors.torch import save_file

    tensors = {
        f"{kind}/{name}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, str(folder / MOMENTS))


def load_moments(folder: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Read back what `save_moments` wrote. Raises `RunError` if it is of other parameters."""
    from safetensors.torch import load_file

    for key, value in load_file(str(folder / MOMENTS)).items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (kind != "step" and value.shape != parameter.shape):
            raise RunError(f"{folder / MOMENTS} is of another model: {name} is not trained here, or has another shape")
        optimizer.state[parameter][kind] = value.to(parameter.device)


def random_state() -> dict[str, Any]:
    """The random states of this process, in integers (a float for a normal deviate that waits to be drawn)."""
    import torch

    version, words, waiting = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 the state that libraries draw from
    assert name == "MT19937"
    state: dict[str, Any] = {
        "python": [version, list(words), waiting],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def save_random_states(folder: Path, states: list[dict[str, Any]]) -> None:
    """Write the states of all ranks, in rank order."""
    (folder / RANDOM).write_text(json.dumps(states) + "\n")


def restore_random_state(folder: Path, rank: int) -> None:
    """Put this process back to the state of a rank; nothing if the checkpoint knows fewer ranks."""
    import torch

    states = json.loads((folder / RANDOM).read_text())
    if rank >= len(states):
        return
    state = states[rank]
    version, words, waiting = state["python"]
    random.setstate((version, tuple(words), waiting))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def check_format(folder: Path) -> None:
    """Raise `RunError` for a checkpoint of a version that stored the optimiser as pickles."""
    if not (folder / MOMENTS).is_file():
        raise RunError(
            f"{folder} is a checkpoint of an earlier b3, which this version does not continue; finish that run with the"
            " version that began it, or choose another output_dir"
        )


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
