"""The process group that torchrun or accelerate starts, and the few things done over it."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np

from b3 import peers
from b3.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SHARED_BYTES = 512 << 20  # of /dev/shm
SILENT_SECONDS = 1800.0  # a process that shows no life for longer is lost, whatever it was to do
BLOCK_BYTES = 64 << 20  # of one message of arrays
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy", "scipy", "numba", "pillow")  # that decide numbers


def launched_ranks() -> int:
    """Processes that were launched together, known before any group exists (and before torch is imported)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes, known before any group exists."""
    return os.environ.get("RANK", "0") == "0"


def device_index() -> int:
    """Which of the visible GPUs is this rank's: one each, or the only one where the launcher shows a rank its own.

    Raises:
        RunError: there are more ranks on this machine than GPUs that they can see.
    """
    import torch

    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count > 1:
        raise RunError(
            f"rank {index} of this machine has no GPU, {count} are visible; start at most {count} ranks on a machine"
            f" (torchrun --nproc_per_node={count}), or look at CUDA_VISIBLE_DEVICES"
        )
    return index if index < count else 0


def start(timeout_minutes: float = 30.0, overlap: bool = False) -> None:
    """Join the process group of the launcher; nothing for a single process.

    Tensors on a GPU travel over NCCL, all else over gloo, so that control messages neither wait for a GPU nor for a
    rank that is gone: those raise at once, and within the timeout for one that hangs. A rank that waits in NCCL cannot
    be interrupted; `b3.peers` ends it.

    Args:
        timeout_minutes: a rank that waits longer for the others ends with an error.
        overlap: do not wait on the host for each NCCL call (sharded weights are fetched ahead of their layer).
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if launched_ranks() == 1:
        if is_alone_on_many_gpus():
            print(f"note: one of {torch.cuda.device_count()} GPUs is used; for all: torchrun --nproc_per_node=gpu ...")
        return
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if torch.cuda.is_available():
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "0" if overlap else "1")
        device = torch.device("cuda", device_index())
        torch.cuda.set_device(device)
        note_shared_memory()
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    peers.start(rank(), world_size(), min(timeout.total_seconds(), SILENT_SECONDS), gather_objects)
    agree("versions", versions(), "install the same on every machine")


def versions() -> dict[str, str]:
    """Of Python (without its patch level), b3 and the libraries that decide numbers."""
    from importlib.metadata import PackageNotFoundError, version

    from b3 import __version__

    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "b3": __version__}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def agree(what: str, facts: Mapping[str, Any], remedy: str) -> None:
    """Raise `RunError`, on every rank, naming what differs between the ranks' `facts` (JSON values); a collective call.

    They share one batch, one ranking, one list of items: what is not the same on all of them would mix silently.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    first, *others = gather_objects(dict(facts))
    for number, part in enumerate(others, start=1):
        if part != first:
            path, ours, theirs = _difference(first, part)
            raise RunError(
                f"the {what} of rank {number} differ from those of rank 0 ({path} {theirs!r} there, {ours!r} here);"
                f" {remedy}"
            )


def _difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any]:
    """(dotted key, our value, theirs) of the first difference of two trees that differ."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return path, ours, theirs
    key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
    return _difference(ours.get(key), theirs.get(key), f"{path}.{key}" if path else str(key))


def note_shared_memory(folder: str = "/dev/shm") -> None:
    """Say so, once on a machine, if NCCL may not find the room that it takes there: containers have 64 MiB of it."""
    with contextlib.suppress(OSError):
        room = os.statvfs(folder)
        if os.environ.get("LOCAL_RANK", "0") == "0" and (free := room.f_bavail * room.f_frsize) < SHARED_BYTES:
            print(
                f"note: {free >> 20} MiB are free in {folder} and NCCL may need {SHARED_BYTES >> 20};"
                " start the container with --shm-size=1g",
                file=sys.stderr,
                flush=True,
            )


def is_alone_on_many_gpus() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() > 1


def stop() -> None:
    """Leave the process group, after success only: NCCL waits here for ranks that are still at work."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    peers.stop()


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
    any_rank(False)  # on the host, unlike a barrier of NCCL


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. Small control data only: it is one message."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, or the `RunError` it ends with there; others may not see its files yet."""
    found: tuple[T | None, str | None] = (None, None)
    if rank() == 0:
        try:
            found = (work(), None)
        except RunError as error:
            found = (None, str(error))
    result, problem = gather_objects(found)[0]
    if problem is not None:
        raise RunError(problem)
    return cast("T", result)


def numbers_of_ranks(values: list[float]) -> list[list[float]]:
    """A few numbers of every rank, in rank order, on every rank."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return [values]
    numbers = torch.tensor(values, dtype=torch.float64)
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

    def moved(array: np.ndarray) -> np.ndarray:
        for start in range(0, len(array), BLOCK_BYTES):
            block = torch.from_numpy(array[start : start + BLOCK_BYTES].copy())
            message(block)
            if parts is None:
                array[start : start + BLOCK_BYTES] = block.numpy()
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
