"""Several nodes on this machine: a torchrun agent each, with ranks of its own, that meet at the loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from processes import MARK, ROOT, end, free_port


class Nodes:
    """A Python program on `nodes` agents with `ranks` processes each; used as a context, it leaves nothing behind."""

    def __init__(self, folder: Path, *arguments: str | Path, nodes: int = 2, ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.marks = [uuid.uuid4().hex for _ in range(nodes)]
        self.logs = [folder / f"node-{node}.log" for node in range(nodes)]
        self.agents = []
        for node, (mark, log) in enumerate(zip(self.marks, self.logs, strict=True)):
            launcher = [
                "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node_rank={node}", f"--nproc_per_node={ranks}",
                "--master_addr=127.0.0.1", f"--master_port={port}",
            ]  # fmt: skip
            environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", MARK: mark}
            with log.open("w") as stream:
                agent = subprocess.Popen(
                    [sys.executable, *launcher, *map(str, arguments)],
                    env=environment, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True,
                )  # fmt: skip
            self.agents.append(agent)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        for node in range(len(self.marks)):
            self.kill(node)

    def kill(self, node: int) -> None:
        """As when a machine is lost: the agent and all its ranks, by SIGKILL."""
        end(self.marks[node])
        self.agents[node].wait()

    def wait(self, node: int, timeout: float) -> int:
        """Exit code of an agent."""
        return self.agents[node].wait(timeout)

    def when(self, condition: Callable[[], bool], timeout: float) -> bool:
        limit = time.monotonic() + timeout
        while not condition() and time.monotonic() < limit and all(agent.poll() is None for agent in self.agents):
            time.sleep(0.02)
        return condition()

    def text(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in self.logs)
