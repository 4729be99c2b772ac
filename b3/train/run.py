"""A recipe from start to end: build the parts, say what will happen, run, write what came out."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3 import __version__, distributed
from b3.config import Config
from b3.config.checks import check
from b3.data.datasets import load_datasets
from b3.errors import RunError
from b3.files import changes, tidy, write_json
from b3.locks import alone
from b3.train.announce import describe, estimate, memory_note
from b3.train.build import build_trainer, check_stored_negatives, load_plans
from b3.train.checkpoint import (
    RESULT,
    check_format,
    checkpoint_facts,
    checkpoint_step,
    claim_folder,
    data_facts,
    decisive,
    newest_checkpoint,
    prune,
    rewind_log,
    wait_for_checkpoint,
    weights_facts,
)
from b3.train.stop import Stopped, StopRequest

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan


ENVIRONMENT = "environment.json"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run gives: its folder, seconds of this part, and whether nothing was left to do or a signal ended it."""

    folder: Path
    seconds: float
    already_complete: bool = False
    stopped: bool = False


def train(config: Config) -> Trained:
    """Run a recipe to its end, resuming if its folder holds a part of it.

    SIGTERM and SIGUSR1 end it after the step it is in, with a checkpoint (`Trained.stopped`).

    Raises:
        InputError: anything in the recipe, the data or the folder that cannot be used; nothing is overwritten.
    """
    from b3.train.sampler import build_sampler

    folder = Path(config.output_dir)
    config = follow_launcher(config)
    check(config)  # a `Config` may come from a dictionary, not from `load_config`
    check_ranks(config)
    check_machine(config)
    with StopRequest() as request, ExitStack() as held:
        if distributed.launched_ranks() > 1:
            distributed.start(config.train.timeout_minutes, overlap=config.model.shard)
        if distributed.gather_objects(_steps_done(folder) >= config.train.steps)[0]:  # others may not see the file yet
            distributed.by_first(lambda: _tidy_complete(config))
            return Trained(folder, 0.0, already_complete=True)
        datasets = load_datasets(config)
        check_stored_negatives(config, datasets)
        plans = load_plans(config, datasets)
        distributed.start()  # says so where other GPUs are idle
        sampler = build_sampler(config, datasets, plans)  # its checks come before the model is loaded
        facts = data_facts(datasets, plans) | weights_facts(config)
        recipe = decisive(config.model_dump(mode="json"))
        distributed.agree("recipe and data", {"recipe": recipe, "data": facts}, "give every machine the same")
        checkpoint, notes = _claim(config, facts, held)
        if checkpoint is not None:
            wait_for_checkpoint(checkpoint)
            sampler.start = checkpoint_step(checkpoint)
            if sampler.random_steps is None:
                sampler.random_steps = checkpoint_facts(checkpoint)["random_steps"]
        started = time.perf_counter()
        trainer = build_trainer(config, datasets, plans, sampler, request)
        if distributed.rank() == 0:
            _announce(config, trainer, datasets, plans, notes)
        try:
            finished = trainer.run(checkpoint)
        except Stopped:
            finished = False
        seconds = time.perf_counter() - started
        if finished and distributed.rank() == 0:
            from b3.train.finish import finish

            finish(config, trainer, datasets, plans, seconds)
        distributed.barrier()
    return Trained(folder, seconds, stopped=not finished)


def _steps_done(folder: Path) -> int:
    try:
        return int(json.loads((folder / RESULT).read_text())["steps"])
    except (OSError, ValueError, KeyError):
        return 0


def _tidy_complete(config: Config) -> None:
    claim_folder(config)
    prune(Path(config.output_dir), config.train.keep_checkpoints)  # a power failure brings back what was being deleted


def _claim(config: Config, facts: dict[str, Any], held: ExitStack) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from and what to say about it; decided by the first rank, which locks the folder.

    `facts` as `claim_folder` takes them.
    """
    newest, notes = distributed.by_first(lambda: _claim_folder(Path(config.output_dir), config, facts, held))
    return (None if newest is None else Path(newest)), notes


def _claim_folder(folder: Path, config: Config, facts: dict[str, Any], held: ExitStack) -> tuple[str | None, list[str]]:
    held.enter_context(alone(folder, "run", "choose another output_dir"))
    tidy(folder)
    notes = claim_folder(config, facts) + other_versions(folder)
    prune(folder, config.train.keep_checkpoints)  # a run that was cut off may not save again
    newest = newest_checkpoint(folder)
    if newest is not None:
        check_format(newest)
        before, now = checkpoint_facts(newest)["world_size"], distributed.world_size()
        if before != now:
            notes.append(
                f"{now} ranks where {before} were: the same batches, losses equal up to rounding"
                + ("; dropout is drawn anew" if config.adapter.dropout else "")
            )
    (folder / RESULT).unlink(missing_ok=True)  # of a run that is now to be longer
    return (None if newest is None else str(newest)), notes


def _announce(
    config: Config, trainer: Any, datasets: list[PairDataset], plans: list[BatchPlan], notes: list[str]
) -> None:
    """Write environment.json, cut the log to where training starts, and print what will happen."""
    folder = Path(config.output_dir)
    for log in (trainer.metrics, trainer.bad_rows.file):
        rewind_log(log, trainer.sampler.start)
    kernel = trainer.embedder.attention_kernel(config.train.bf16)
    run_by = {"attention": kernel, "layers": trainer.embedder.execution}
    if trainer.embedder.multiplies_by_onednn and not config.train.bf16:
        run_by["products"] = "oneDNN"
    write_json(folder / ENVIRONMENT, {**environment(distributed.world_size()), **run_by})
    lines = [describe(config, datasets, trainer.sampler, plans), *(f"  {what}: {how}" for what, how in run_by.items())]
    told = estimate(config, datasets, trainer.sampler, trainer.embedder)
    lines += told.lines()
    if trainer.embedder.device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(trainer.embedder.device)
        note = memory_note(told, told.weights, free)
        notes = notes if note is None else [*notes, note]
    if config.model.shard and distributed.world_size() == 1:
        notes = [*notes, "model.shard spreads nothing over a single rank"]
    lines += [f"  note: {note}" for note in notes]
    print("\n".join(lines), flush=True)


def check_ranks(config: Config) -> None:
    """Raise `RunError` if the batch does not divide over the ranks; needs nothing heavy."""
    size, ranks = config.batch.size, distributed.launched_ranks()
    if size % ranks:
        raise RunError(f"batch.size {size} does not divide over {ranks} ranks; change one of them")


def check_machine(config: Config) -> None:
    """Raise `RunError` if the recipe asks for what this machine or installation does not have."""
    from importlib.util import find_spec

    for name in config.train.trackers:
        if find_spec(name) is None:
            raise RunError(f"train.trackers: {name} is not installed; pip install 'b3[trackers]', or leave it out")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise RunError(
            "DeepSpeed is not supported: its engine owns backward and step, and the cached step does both in parts."
            " Start with torchrun; model.shard=true spreads the frozen weights over the ranks as ZeRO-3 would"
        )
    if config.model.quantize:
        import torch

        if not torch.cuda.is_available():
            raise RunError("model.quantize nf4 needs a GPU and none is visible; leave it out")
        if find_spec("bitsandbytes") is None:
            raise RunError("model.quantize nf4 needs bitsandbytes; pip install bitsandbytes, or leave it out")
    if config.train.bf16 or (config.model.dtype == "bfloat16" and config.model.train != "full"):
        import torch

        if not torch.cuda.is_available():
            asked = "train.bf16 true" if config.train.bf16 else "model.dtype bfloat16"
            raise RunError(
                f"{asked} needs a GPU and none is visible; check the driver and CUDA_VISIBLE_DEVICES, or set"
                " train.bf16=false model.dtype=float32"
            )
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise RunError(
                f"{torch.cuda.get_device_name(0)} does not compute in bfloat16; set train.bf16=false"
                " model.dtype=float32"
            )


def follow_launcher(config: Config) -> Config:
    """The recipe with `model.shard` set if accelerate was told to use FSDP, whose own wrapping is then left out.

    Its wrapper would average the gradients of every chunk over the ranks; see `b3.train.shard` for what is done.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return config
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RunError("accelerate asks for FSDP 1, which is not supported; take configs/accelerate/fsdp2.yaml")
    del os.environ["ACCELERATE_USE_FSDP"]
    return config.model_copy(update={"model": config.model.model_copy(update={"shard": True})})


def other_versions(folder: Path) -> list[str]:
    """Notes on libraries that have changed since an earlier part of the run in `folder`."""
    try:
        before = json.loads((folder / ENVIRONMENT).read_text())["libraries"]
    except (OSError, ValueError, KeyError):
        return []
    now = {name: version for name, version in environment(1)["libraries"].items() if name in before}
    return [f"{change}: equal up to rounding" for change in changes(before, now).values()]


def environment(world_size: int) -> dict[str, Any]:
    """Versions and hardware of a run."""
    from importlib.metadata import version

    import torch

    libraries = ("torch", "transformers", "peft", "accelerate", "numpy", "pillow")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "b3": __version__,
        "libraries": {name: version(name) for name in libraries},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "world_size": world_size,
    }
