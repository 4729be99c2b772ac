"""Starts evaluations with workers beside busy processes, again and again, and counts what hangs.

    python tests/hardening/stress_workers.py --starts 200            eval_mmeb.py on 2 ranks with 1 worker each
    python tests/hardening/stress_workers.py --starts 1000 --light   only pools, from a process with many threads

Not part of `make test`: 200 starts take an hour or more. A start that takes longer than --limit seconds counts as a
hang and is killed with all that it has started, and so is the current one when SIGTERM or SIGINT ends the program.
Exit code 1 if any start hung, failed or left a process behind.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from golden_data import GOLDEN, checkpoint  # noqa: E402
from processes import run_python  # noqa: E402

BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100000))"
LIGHT = """
import sys, threading
import torch
from b3.model import workers
from b3.model.workers import WorkerPool
workers.PRELOAD = ()
torch.set_num_threads(4)
stop = threading.Event()
def work():  # takes locks and allocates all the time, as gloo, tokenizers and OpenMP do
    while not stop.is_set():
        torch.randn(200, 200) @ torch.randn(200, 200)
for _ in range(4):
    threading.Thread(target=work).start()
for start in range(int(sys.argv[1])):
    pool = WorkerPool(2, time_limit=120)
    job = pool.job(len)
    tasks = [pool.submit(job, "x" * n, str) for n in range(20)]
    assert [pool.result(task) for task in tasks] == list(range(20))
    pool.close()
stop.set()
"""


def evaluation(folder: Path, number: int) -> list[str | Path]:
    data = GOLDEN / "mmeb-eval"
    return [
        "eval_mmeb.py", "--model_name", folder / "model", "--normalize", "True", "--dataset_name", data,
        "--subset_name", "all", "--image_dir", data / "eval_images", "--dataloader_num_workers", "1",
        "--encode_output_path", folder / f"out-{number}",
    ]  # fmt: skip


def outcome(arguments: list[str | Path], ranks: int, limit: float) -> str:
    try:
        done = run_python(*arguments, ranks=ranks, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return "hung"
    except AssertionError as error:
        return str(error)
    if done.returncode:
        print(done.stderr[-2000:], flush=True)
    return f"exit code {done.returncode}"


def leave(number: int, frame: Any) -> None:
    """Unwinds to whoever has started something, who then ends it."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--busy", type=int, default=2, help="processes that do nothing but keep a core busy")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a start has hung")
    parser.add_argument("--light", action="store_true", help="pools without a model, ten to a process")
    options = parser.parse_args()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, leave)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
    counts: Counter[str] = Counter()
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if not options.light:
                (folder / "model").mkdir()
                checkpoint(folder / "model")
            (folder / "light.py").write_text(LIGHT)
            each = 10 if options.light else 1
            for number in range(0, options.starts, each):
                if time.monotonic() - started > 60 * options.minutes:
                    break
                arguments = [folder / "light.py", str(each)] if options.light else evaluation(folder, number)
                counts[outcome(arguments, 1 if options.light else 2, options.limit)] += each
                seconds = time.monotonic() - started
                print(f"{sum(counts.values())} starts in {seconds:.0f} s: {dict(counts)}", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return int(set(counts) != {"exit code 0"})


if __name__ == "__main__":
    sys.exit(main())
