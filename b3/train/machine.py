"""What a run needs of the machine and its launcher, checked before anything heavy starts."""

from __future__ import annotations

import os
import platform
from typing import Any

from b3 import __version__, distributed
from b3.config import Config
from b3.errors import RunError


def check_ranks(config: Config) -> None:
    """Raise `RunError` if the batch does not divide over the ranks; needs nothing heavy."""
    ranks = distributed.launched_ranks()
    if config.batch.size < ranks:
        raise RunError(f"{ranks} ranks share a batch of {config.batch.size} rows; start fewer ranks")
    if config.batch.size % ranks:
        raise RunError(f"batch.size {config.batch.size} does not divide over {ranks} ranks")


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
    if config.train.bf16 or config.model.dtype == "bfloat16":
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
