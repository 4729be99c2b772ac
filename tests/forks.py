"""Real training processes that start in a moment: forked from a server that has imported everything already.

`Job` is one run of train.py (or another program, MODULE or MODULE:FUNCTION) on 1 or more ranks, each a process of its
own that can be signalled and killed. `prepare`, given the rank, runs in each before the program does. Figures of pages,
half the time of a tiny run, are built but not drawn, unless `draws` is set.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
# What runs import on the way: what is missing here, each process imports anew, which takes seconds.
PRELOAD = (
    "b3.train.run b3.train.loop b3.train.finish b3.train.shard b3.train.debug b3.eval.run b3.eval.plots"
    " b3.model.export b3.mining.recipe b3.mining.miners.anneal b3.mining.search_kernels b3.mining.graph_kernels"
    " eval_mmeb scripts.embed scripts.mine scripts.prepare_mmeb scripts.export"
    " sympy scipy.sparse scipy.optimize pandas peft accelerate numba.typed torch._dynamo torch.distributed.fsdp"
    " transformers.models.qwen2_vl.modeling_qwen2_vl b3.model.backbones.qwen2_vl"
    " transformers.models.auto.image_processing_auto transformers.models.auto.processing_auto matplotlib.figure"
    " matplotlib.backends.backend_agg matplotlib.backends.backend_svg pyarrow.dataset safetensors.numpy forks"
).split()
CONTEXT.set_forkserver_preload(PRELOAD)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Figures of pages are built, but the pages have an empty drawing in their place."""
    from matplotlib.figure import Figure

    drawn = Figure.savefig

    def savefig(sheet: Figure, place: Any, **options: Any) -> None:
        if isinstance(place, io.StringIO):
            place.write("<svg></svg>")
        else:  # a file of its own
            drawn(sheet, place, **options)

    Figure.savefig = savefig
    try:
        yield
    finally:
        Figure.savefig = drawn


def _rank(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    log: str,
    prepare: Callable[[int], None] | None,
    draws: bool,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for _ in range(2))
    os.environ.update(environment)
    if prepare is not None:
        prepare(int(environment.get("RANK", "0")))
    module, _, function = program.partition(":")
    with contextlib.nullcontext() if draws else undrawn():
        code = getattr(import_module(module), function or "main")(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Job:
    """A started run; ranks are processes 0 .. n-1."""

    def __init__(
        self,
        logs: Path,
        *arguments: str,
        ranks: int = 1,
        variables: dict[str, str] | None = None,
        program: str = "train",
        prepare: Callable[[int], None] | None = None,
        draws: bool = False,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(ranks)]
        port = free_port()
        self.processes = []
        for rank in range(ranks):
            environment = {"PYTHONWARNINGS": "ignore", **(variables or {})}
            if ranks > 1:
                environment |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            process = CONTEXT.Process(
                target=_rank, args=(program, list(arguments), environment, str(self.logs[rank]), prepare, draws)
            )
            process.start()
            self.processes.append(process)

    def signal(self, number: signal.Signals, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        for rank in range(len(self.processes)):
            self.signal(signal.SIGKILL, rank)

    def wait(self, timeout: float = 120.0) -> list[int | None]:
        """Exit codes of the ranks; those that do not end in time are killed and give None."""
        end = time.monotonic() + timeout
        codes = []
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            codes.append(process.exitcode)
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def when(self, condition: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Wait for a condition; False if all ranks ended or the time was up before it held."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end or not any(process.is_alive() for process in self.processes):
                return condition()
            time.sleep(0.002)
        return True

    def text(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()
