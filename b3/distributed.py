"""The process group that torchrun or accelerate starts, and the few things done over it."""

from __future__ import annotations

import atexit
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
BLOCK_BYTES = 64 << 20  # of one message of arrays


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


def leave(code: int) -> NoReturn:
    """End the process with an exit code; as one of several ranks without taking the interpreter apart.

    Threads of the process group or of a library that still run while Python finalises abort a rank now and then
    (SIGABRT, "terminate called without an active exception", after everything was written), and torchrun then reports
    a failed job. Exit handlers run and the streams are flushed first.
    """
    if launched_ranks() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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
    """`value` of every rank, in rank order, on every rank. Small control data only: it is one message."""
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
    numbers = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        numbers = numbers.cuda()
    parts = [torch.empty_like(numbers) for _ in range(world_size())]
    dist.all_gather(parts, numbers)
    return [part.tolist() for part in parts]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; every rank gets the same answer."""
    return any(part[0] for part in numbers_of_ranks([float(flag)]))


def gather_arrays(value: T) -> Iterator[T]:
    """`value` of every rank in turn, on every rank: numpy arrays, or lists, dictionaries, dataclasses of them.

    One rank's value is under way at a time, in messages of at most `BLOCK_BYTES`.
    """
    import torch.distributed as dist

    if world_size() == 1:
        yield value
        return
    for source in range(world_size()):
        parts = _move(_parts(value) if rank() == source else None, partial(dist.broadcast, src=source))
        yield value if rank() == source else _whole(parts)


def gather_arrays_to(value: T, owner: int) -> list[T]:
    """`value` of every rank, in rank order, on rank `owner`; an empty list on the others. As `gather_arrays`."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    if rank() != owner:
        _move(_parts(value), partial(dist.send, dst=owner))
        return []
    return [
        value if source == owner else _whole(_move(None, partial(dist.recv, src=source)))
        for source in range(world_size())
    ]


def _parts(value: Any) -> list[np.ndarray]:
    """A pickle without the arrays' contents, then those: flat uint8."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer))
    assert len(head) <= BLOCK_BYTES, "arrays only, and each contiguous"
    return [np.frombuffer(head, dtype=np.uint8), *(np.frombuffer(b.raw(), dtype=np.uint8) for b in buffers)]


def _whole(parts: list[np.ndarray]) -> Any:
    return pickle.loads(parts[0].tobytes(), buffers=parts[1:])


def _move(parts: list[np.ndarray] | None, message: Callable[[Tensor], Any]) -> list[np.ndarray]:
    """Send parts, or receive them if None, by calling `message` with tensors of at most `BLOCK_BYTES`."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"

    def moved(array: np.ndarray) -> np.ndarray:
        for start in range(0, len(array), BLOCK_BYTES):
            block = torch.from_numpy(array[start : start + BLOCK_BYTES].copy()).to(device)
            message(block)
            if parts is None:
                array[start : start + BLOCK_BYTES] = block.cpu().numpy()
        return array

    def numbers(values: list[int]) -> list[int]:
        received: list[int] = moved(np.array(values, dtype=np.int64).view(np.uint8)).view(np.int64).tolist()
        return received

    if parts is not None:
        numbers([len(parts)])
        numbers([len(part) for part in parts])
        return [moved(part) for part in parts]
    sizes = numbers([0] * numbers([0])[0])
    return [moved(np.empty(size, dtype=np.uint8)) for size in sizes]
