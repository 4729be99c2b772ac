"""What goes wrong on one rank, put into a process before its program runs; picklable."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def bug() -> NoReturn:
    raise IndexError("a bug\nin two lines")


def out_of_memory() -> NoReturn:
    import torch

    raise torch.OutOfMemoryError(OOM)


def disk_full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")


def block_forever() -> NoReturn:
    """Wait in C, where no signal handler of Python runs and no exception can be raised: as in a collective of NCCL."""
    mutex, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)  # zeros: an open mutex
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
    raise AssertionError


def _blocking(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return collective(*arguments, **options)
        except RuntimeError:  # gloo: the peer is gone
            block_forever()

    return call


def no_memory(rank: int) -> None:
    """A machine without room for batches that are read ahead."""
    from b3.train import room

    room.free_memory = lambda: 1000


@dataclass(frozen=True)
class Fault:
    """`what` happens on one rank, where a function of b3 is called for the `call`-th time (counted from 1).

    where: module:name or module:class.name. blocking: data collectives of training never return once a peer is gone.
    """

    what: Callable[[], NoReturn]
    where: str = "b3.train.step:CachedStep.__call__"
    rank: int = 1
    call: int = 3
    blocking: bool = False

    def __call__(self, rank: int) -> None:
        from importlib import import_module

        if self.blocking:
            import torch.distributed as dist

            from b3.train import objective, step

            slow = {name: _blocking(getattr(dist, name)) for name in ("all_reduce", "all_gather")}
            objective.dist = step.dist = SimpleNamespace(**slow)
        if rank == self.rank:
            module, _, name = self.where.partition(":")
            holder, name = import_module(module), name
            if "." in name:
                holder, name = getattr(holder, name.partition(".")[0]), name.partition(".")[2]
            setattr(holder, name, _counted(getattr(holder, name), self.call, self.what))


def _counted(function: Callable[..., Any], call: int, what: Callable[[], NoReturn]) -> Callable[..., Any]:
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            what()
        return function(*arguments, **options)

    return counted


def other_versions(rank: int) -> None:
    """A machine with another torch."""
    from b3 import distributed

    if rank == 1:
        usual = distributed.versions
        distributed.versions = lambda: usual() | {"torch": "1.0"}


def other_data(rank: int) -> None:
    """A machine whose copy of the data is another."""
    from b3.data.datasets import PairDataset

    if rank == 1:
        PairDataset.fingerprint = lambda self: "other"  # type: ignore[method-assign]
