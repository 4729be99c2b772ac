"""How much memory is free, and arrays that take none of it where they are large.

An array above a share of the free memory lies in a file that is mapped: the system writes its pages out and takes them
back as it needs. The file is in the folder of temporary files (``TMPDIR``) and has no name, so it goes with the array.
Where an array lies changes no result.
"""

from __future__ import annotations

import math
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SHARE = 1 / 16  # of the free memory, that the arrays of all ranks on a machine may take, one of each
MIN_MAPPED = 1 << 26  # bytes; smaller arrays never lie in a file


def free_memory() -> int | None:
    """Bytes that processes of this machine (or container) can still take, or None where that is unknown."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
        cgroup = Path("/sys/fs/cgroup")
        most, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        limits.append(int(most) - int(used))
    except (OSError, ValueError, StopIteration):  # another system, no such limit ("max")
        pass
    return min(limits, default=None)


def local_ranks() -> int:
    """Ranks on this machine, as the launcher says; without its word all of them."""
    names = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


@lru_cache(maxsize=1)
def most_in_memory() -> int:
    """Bytes of the largest array that `room_for` keeps in memory, decided once for a process."""
    return max(MIN_MAPPED, int((free_memory() or 1 << 34) * SHARE / local_ranks()))


def room_for(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array to be filled: as `numpy.empty`, or mapped from a new file where it is large and the disk has room."""
    size = math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize
    if size <= most_in_memory():
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile(prefix="b3-array-") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a mapped page that the disk has no room for ends the process
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except (OSError, AttributeError):  # no room, or a system without that call
        return np.empty(shape, dtype)
