"""Programs run as processes that never outlive their test: any number of ranks, a time limit, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "B3_TEST_RUN"  # in the environment of a program, hence of all that it starts, whatever its session or parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def marked(mark: str) -> list[int]:
    """Processes that a program has started, itself included, as long as they run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end(mark: str, grace: float = 0.0) -> list[int]:
    """Kill what is still there after so many seconds, and return it."""
    limit = time.monotonic() + grace
    while marked(mark) and time.monotonic() < limit:
        time.sleep(0.05)
    left: dict[int, None] = {}
    while running := marked(mark):  # one may start another between the look and the kill
        left.update(dict.fromkeys(running))
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return list(left)


def run_python(
    *arguments: str | Path, ranks: int = 1, timeout: float = 600.0, check: bool = True, path: Path = ROOT / "tests"
) -> subprocess.CompletedProcess[str]:
    """Run a Python program, under torchrun for several ranks. Fails if it takes too long or leaves processes behind."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{path}", "OMP_NUM_THREADS": "1", MARK: mark}
    process = subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        end(mark)
        out, err = process.communicate()
        print(out, err, sep="\n")
        raise
    left = end(mark, grace=10.0)
    assert not left, f"{arguments[0]} has left {len(left)} processes behind"
    assert not check or process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
