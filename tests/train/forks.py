"""Real training processes that start in a moment: forked from a server that has imported everything already.

`Job` is one run of train.py (or another program) on 1 or more ranks, each a process of its own that can be signalled
and killed. `prepare`, given the rank, runs in each before the program does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["b3.train.loop", "b3.train.run", "b3.train.finish", "forks"])


def _rank(
    program: str, arguments: list[str], environment: dict[str, str], log: str, prepare: Callable[[int], None] | None
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for _ in range(2))
    os.environ.update(environment)
    if prepare is not None:
        prepare(int(environment.get("RANK", "0")))
    code = import_module(program).main(arguments)
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
                target=_rank, args=(program, list(arguments), environment, str(self.logs[rank]), prepare)
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
