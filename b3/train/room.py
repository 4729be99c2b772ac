"""Whether what the workers read ahead fits into the memory of the machine, asked before the first step.

Workers hand batches over through sockets, in pieces, so that nothing lies in /dev/shm and the 64 MiB of it that a
container has by default are enough. What is ready waits in the memory of the rank: at most `TASKS_AHEAD` batches for
each worker, whatever the number of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from b3.console import num_bytes
from b3.errors import DataError, RunError
from b3.memory import free_memory, local_ranks
from b3.model.workers import TASKS_AHEAD

if TYPE_CHECKING:
    from b3.train.inputs import StepCollator
    from b3.train.sampler import BatchPlanSampler

SAMPLE_ROWS = 8


def check_first_batch(collator: StepCollator, sampler: BatchPlanSampler, workers: int) -> None:
    """`check_room` for this rank, from some rows of its first batch."""
    rows = next(iter(sampler), [])
    sample = rows[:SAMPLE_ROWS]
    if not workers or not sample:
        return
    try:
        size = collator(sample).nbytes * len(rows) // len(sample)
    except DataError:
        return  # said, or replaced, when the batch is read
    check_room(size, workers, local_ranks(), free_memory())


def check_room(batch_bytes: int, workers: int, ranks: int, free: int | None) -> None:
    """Raise `RunError` if the batches that wait for their step do not fit.

    Args:
        batch_bytes: of one rank's share of a batch, as workers hand it over.
        workers: of each rank.
        ranks: on this machine.
        free: bytes of memory, or None if unknown.
    """
    need = batch_bytes * TASKS_AHEAD * workers * ranks
    if free is not None and need > free:
        most = int(free / (batch_bytes * TASKS_AHEAD * ranks))
        raise RunError(
            f"batches that are read ahead take {num_bytes(need)} of memory ({num_bytes(batch_bytes)} each,"
            f" {TASKS_AHEAD} for each of {workers} workers on {ranks} ranks), {num_bytes(free)} are free;"
            f" set train.workers to {most} or fewer, lower model.max_pixels, or give the job (docker: --memory) more"
        )
