"""The process group that torchrun or accelerate starts, and the few things done over it."""

from __future__ import annotations

import os
from typing import Any


def launched_ranks() -> int:
    """Processes that were launched together, known before any group exists (and before torch is imported)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes, known before any group exists."""
    return os.environ.get("RANK", "0") == "0"


def start(timeout_minutes: float = 30.0) -> None:
    """Join the process group of the launcher; nothing for a single process.

    A rank that waits longer than the timeout for the others ends with an error instead of hanging.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if launched_ranks() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def stop() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Only for data made by the ranks themselves."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def numbers_of_ranks(values: list[float]) -> list[list[float]]:
    """A few numbers of every rank, in rank order, on every rank."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return [values]
    own = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        own = own.cuda()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return [part.tolist() for part in parts]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; every rank gets the same answer."""
    return any(part[0] for part in numbers_of_ranks([float(flag)]))


def gather_objects_to(value: Any, owner: int) -> list[Any]:
    """`value` of every rank, in rank order, on rank `owner`; an empty list on the others."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    parts: list[Any] | None = [None] * world_size() if rank() == owner else None
    dist.gather_object(value, parts, dst=owner)
    return parts or []
