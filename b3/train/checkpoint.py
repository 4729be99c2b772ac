"""What makes a run safe to kill: checkpoints visible only when complete, a log without replays, one run per folder.

A checkpoint holds safetensors and JSON only: the weights with all that loads them; optimizer.safetensors, the moments
of each trained parameter by its name; random.json, the random states of each rank as integers; and complete.json, the
step and what the log has gathered since its last line. The learning rate is a function of the step. config.yaml and
data.json say which run a folder belongs to, `claim_folder` which one may continue it.
"""

from __future__ import annotations

import contextlib
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
from b3.files import belongs_elsewhere, changes, claim, write_json, write_text
from b3.model.checkpoint import sampled_key

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
DATA = "data.json"
DEBUG = "debug.json"  # the folder of a debug run holds its model and plans before it starts
# Keys that may change between the parts of a run: they decide nothing about its weights. Plans go by what they hold.
_FREE_KEYS = {
    "resume", "output_dir", "mining.dir", "train.workers", "train.save_every", "train.keep_checkpoints",
    "train.log_every", "train.trackers",
    "train.save_merged", "train.timeout_minutes", "mining.batch_tokens",
}  # fmt: skip
_FREE_SECTIONS = ("eval",)
# Keys that leave the gradient what it is up to rounding (and draw dropout anew): allowed, and said.
_ROUNDING_KEYS = {
    "train.chunk_tokens", "model.attention", "model.gradient_checkpointing", "model.shard", "train.vision_cache_mib",
    "train.kept_chunks",
    "model.compile",
}  # fmt: skip


def stage(run: Path) -> Path:
    """An empty folder, out of sight, for a checkpoint."""
    shutil.rmtree(run / STAGING, ignore_errors=True)  # a torn one of an earlier attempt
    (run / STAGING).mkdir(parents=True)
    return run / STAGING


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


def publish(staged: Path, run: Path, facts: dict[str, Any]) -> None:
    """Give a finished checkpoint its place: its files and its marker are on disk before its name is."""
    mark_complete(staged, facts)
    files.publish(staged, run / f"checkpoint-{facts['step']}")


def prune(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and damaged ones that are older than the newest."""
    for folder in run.glob(f"{files.REMOVED}*"):  # left by a kill
        shutil.rmtree(folder)
    complete = sorted(filter(is_complete, _checkpoints(run)), key=checkpoint_step)[-keep:]
    for folder in _checkpoints(run):
        if complete and folder not in complete and checkpoint_step(folder) < checkpoint_step(complete[-1]):
            files.remove(folder)


def _checkpoints(run: Path) -> list[Path]:
    return [folder for folder in run.glob("checkpoint-*") if _FOLDER.match(folder.name)]


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What `publish` recorded: step, world size and whatever the trainer keeps there."""
    facts: dict[str, Any] = json.loads((folder / MARKER).read_text())
    return facts


def wait_for_checkpoint(folder: Path) -> None:
    """Return once all files of a checkpoint are here, which another rank has seen complete."""
    files.wait_for(folder / MARKER)
    for name in checkpoint_facts(folder)["files"]:
        files.wait_for(folder / name)


def checkpoint_step(folder: Path) -> int:
    match = _FOLDER.match(folder.name)
    assert match is not None, folder
    return int(match[1])


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps; torn ones are passed over."""
    return max(filter(is_complete, _checkpoints(run)), key=checkpoint_step, default=None)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log, JSON with the entry "step" each; one that a kill has torn is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def append_log(file: Path, *lines: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))


def rewind_log(file: Path, step: int) -> None:
    """Drop the lines after `step`, so that a resumed run repeats none."""
    if file.exists():
        write_text(file, "".join(json.dumps(line) + "\n" for line in read_log(file) if line["step"] <= step))


def read_metrics(run: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that carry `kind`: "loss" for training, "evaluation" for evaluations on the way."""
    return [line for line in read_log(run / METRICS) if kind in line]


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
            f"{folder} is a checkpoint of an earlier b3; finish that run with it or choose another output_dir"
        )


def data_facts(datasets: list[PairDataset], plans: list[BatchPlan]) -> dict[str, Any]:
    """What the batches are made of: rows and fingerprint of each data set, and a digest of each plan's arrays.

    And one of some images by their bytes: a fingerprint knows their names alone.
    """
    return {
        dataset.name: {
            "rows": len(dataset),
            "fingerprint": dataset.fingerprint(),
            "images": dataset.images_digest(),
            "plan": plan_digest(plans[number]) if plans else None,
        }
        for number, dataset in enumerate(datasets)
    }


def weights_facts(config: Config) -> dict[str, Any]:
    """What a run starts from, under a name that no data set has."""
    model = config.model
    adapter = None if model.init_adapter is None else sampled_key(model.init_adapter)
    return {"(weights)": {"base": sampled_key(model.name), "adapter": adapter}}


PLACES = ("output_dir", "name", "dir", "source", "image_dir", "teacher", "teacher_adapter", "init_adapter")


def decisive(tree: Any) -> Any:
    """A recipe, or a part of it, without what may differ between ranks: places, whose content is compared instead."""
    if isinstance(tree, dict):
        kept = {key: value for key, value in tree.items() if key not in PLACES or isinstance(value, dict)}
        return {key: decisive(value) for key, value in kept.items() if key not in ("workers", "eval")}
    return [decisive(value) for value in tree] if isinstance(tree, list) else tree


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
    run, notes = Path(config.output_dir), []
    file = run / "config.yaml"
    if not file.exists():
        if not (run / DEBUG).is_file():
            claim(run, {}, "run of b3", "choose another output_dir or empty it", file=file.name)
    elif config.resume == "never":
        raise RunError(f"output_dir {run} holds a run and resume is 'never'; choose another output_dir or delete it")
    elif (run / METRICS).exists() or _checkpoints(run):  # else the earlier attempt failed before its first step
        notes = _compare(run, config)
        if data is not None and (run / DATA).exists():
            before = json.loads((run / DATA).read_text())
            known = {n: {k: v for k, v in facts.items() if k in before[n]} for n, facts in data.items() if n in before}
            differing = changes(before, known)  # an earlier version recorded less
            for key in [key for key in differing if key.endswith(".images")]:  # a broken one was mended, perhaps
                del differing[key]
                notes.append(f"data set {key.removesuffix('.images')}: some images are not those the run began with")
            if differing:
                lines = [re.sub(r"'(\w{12})\w{52}'", r"\1", f"data {change}") for change in differing.values()]
                raise belongs_elsewhere(run, "run", lines, "restore it or choose another output_dir")
    try:
        write_text(file, dump_config(config))
        if data is not None:
            write_json(run / DATA, data)
    except OSError as error:
        raise RunError(f"output_dir {run} cannot be written ({error.strerror}); choose another") from None
    return notes


def _compare(run: Path, config: Config) -> list[str]:
    """Notes on the differences that are allowed. Raises `RunError` with the others."""
    try:  # keys that this version has added are at their defaults
        before = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    except ValueError:
        raise RunError(f"{run / 'config.yaml'} is of another version of b3; choose another output_dir") from None
    notes, refused = [], []
    for key, change in changes(before.model_dump(mode="json"), config.model_dump(mode="json")).items():
        if key in _FREE_KEYS or key.partition(".")[0] in _FREE_SECTIONS:
            continue
        if key in _ROUNDING_KEYS:
            notes.append(f"{change}: equal up to rounding, dropout is drawn anew")
        elif key == "train.steps" and config.train.schedule == "constant" and config.train.steps > before.train.steps:
            notes.append(f"{change}: a constant learning rate goes on as it was")
        else:
            refused.append(change)
    if refused:
        more = "; more steps need train.schedule constant" if refused[0].startswith("train.steps ") else ""
        raise belongs_elsewhere(run, "run", refused, "choose another output_dir or delete it" + more)
    return notes
