"""Starts every program again and again beside busy processes, a third of the starts with a signal to a random process.

    python tests/hardening/stress.py [--starts 300] [--minutes M] [--runs mining,training] [--busy 2] [--seed 0]
    python tests/hardening/stress.py --only 17 --seed 0               one start again
    python tests/hardening/stress.py --light --starts 1000            only pools, from a process with many threads

A start is a function of (seed, number): a program, 1 to 3 ranks, 0, 1 or 4 workers, and in a third of the starts a
signal (SIGTERM, SIGINT, SIGUSR1, SIGKILL, or SIGSTOP and soon SIGCONT), its moment, and which of all processes gets it:
the launcher, a rank, the server of the workers, a worker. After a signal the same command is started again without one.
A tenth of the starts are commands as users give them (several ranks under torchrun); the others are forked from a
server that has imported everything, and where a rank has failed and others do not end by themselves in 15 seconds they
get SIGTERM, as a launcher sends it. Each start has to end within --limit seconds, with exit codes that the signal
explains, at most one message a rank and no traceback; all its processes have to end with it; no file may be left in
TMPDIR or /dev/shm; and what is left at the end are the files of an uninterrupted run. Not part of `make test`. Exit
code 1 if there is any finding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash import PRELOAD, Bench
from paths import CONTEXT, RUNS, Run, contents, differences, prepare, processes

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
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL, signal.SIGSTOP)
MESSAGE = re.compile(r"^(\[rank \d+\] )?(error: |ended by |interrupted|stopped as asked)", re.MULTILINE)
LAUNCHER, RANK, SERVER = "the launcher", "a rank", "the workers"
GRACE = 60.0  # seconds from the end of a program to that of all that it has started


def role(pid: int) -> str:
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return LAUNCHER if b"torch.distributed.run" in line else SERVER if b"import serve" in line else RANK
    return "gone"


@dataclass(frozen=True)
class Blow:
    """A signal, the moment after a start (seconds of a forked one), and which process gets it (0 to 1)."""

    number: signal.Signals
    moment: float
    which: float


@dataclass
class Ended:
    """How a start ended. codes: of the ranks, or of torchrun; None where one did not end. hit: who got the signal."""

    codes: list[int | None]
    texts: list[str]
    hit: str | None
    left: int


class Starts:
    """Starts programs below `root`, always in the folder `root`/work, so that no path differs."""

    def __init__(self, root: Path, limit: float) -> None:
        self.bench, self.limit = Bench(root), limit
        self.temporary, self.logs = root / "tmp", root / "logs"
        self.wholes: dict[tuple[str, int], dict[str, Any]] = {}

    def start(self, run: Run, ranks: int, workers: int, blow: Blow | None, real: bool) -> Ended:
        for folder in (self.temporary, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        how = self.real if real else self.forked
        return how(run, ranks, workers, blow)

    def forked(self, run: Run, ranks: int, workers: int, blow: Blow | None) -> Ended:
        job, mark = self.bench.start(run, ranks, workers)
        end, hit = time.monotonic() + self.limit, None
        pids = [process.pid for process in job.processes if process.pid]
        if blow is not None:
            job.processes[0].join(blow.moment * 0.5)
            alive = [pid for pid, process in zip(pids, job.processes, strict=True) if process.is_alive()]
            hit = strike([*alive, *processes.marked(mark)], blow)
        failed: float | None = None
        while any(process.is_alive() for process in job.processes) and time.monotonic() < end:
            time.sleep(0.05)
            if failed is None and any(process.exitcode for process in job.processes):
                failed = time.monotonic()
            if failed is not None and time.monotonic() - failed > 15:
                failed = end
                for rank in range(ranks):
                    job.signal(signal.SIGTERM, rank)
        codes = [process.exitcode for process in job.processes]
        job.kill()
        left = processes.end(mark, grace=GRACE if None not in codes else 0.0)
        return Ended(codes, [job.text(rank) for rank in range(ranks)], hit, len(left))

    def real(self, run: Run, ranks: int, workers: int, blow: Blow | None) -> Ended:
        mark = uuid.uuid4().hex
        logs = ["--log-dir", str(self.logs), "--redirects", "3"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *logs]
        program = [f"{run.program.replace('.', '/')}.py", *run.command(self.bench.root, self.bench.work, workers)]
        with (self.logs / "main.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *(launcher if ranks > 1 else []), *program], stdout=log, stderr=log,
                env=os.environ | {"TMPDIR": str(self.temporary), processes.MARK: mark}, cwd=processes.ROOT,
                start_new_session=True,
            )  # fmt: skip
            end, hit = time.monotonic() + self.limit, None
            try:
                if blow is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(blow.moment * 3)
                    hit = strike(processes.marked(mark), blow)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(1.0, end - time.monotonic()))
            except BaseException:
                processes.end(mark)
                raise
            code = process.poll()
            left = processes.end(mark, grace=GRACE if code is not None else 0.0)
            process.wait()
        files = sorted(self.logs.rglob("std*.log")) if ranks > 1 else [self.logs / "main.log"]
        return Ended([code], [file.read_text(errors="replace") for file in files], hit, len(left))

    def judge(self, ended: Ended, sent: signal.Signals | None) -> list[str]:
        """What is wrong with a start."""
        if None in ended.codes:
            return [f"did not end within {self.limit:.0f} s, {ended.left} processes"]
        problems = []
        if ended.left:
            problems.append(f"{ended.left} processes were left {GRACE:.0f} s after its end")
        if set(ended.codes) - allowed(sent, ended.hit, len(ended.texts)):
            problems.append(f"exit codes {ended.codes}")
        for text in ended.texts:
            starting = sent == signal.SIGINT and "KeyboardInterrupt" in text and "b3/errors.py" not in text
            if "Traceback" in text and not starting:  # Python itself was still starting
                problems.append("a traceback")
            if len(MESSAGE.findall(text)) > 1:
                problems.append("several messages")
        said = sum(len(MESSAGE.findall(text)) for text in ended.texts)
        begun = sent is None or -sent not in ended.codes  # else it ended as any process, before the program had begun
        if (
            ended.hit == RANK
            and sent not in (signal.SIGKILL, signal.SIGSTOP)
            and any(ended.codes)
            and begun
            and not said
        ):
            problems.append("no message")
        if left := [path.name for path in self.temporary.iterdir() if not path.name.startswith("torchelastic")]:
            problems.append(f"temporary files are left: {left[:3]}")
        return problems


def allowed(sent: signal.Signals | None, hit: str | None, ranks: int) -> set[int | None]:
    """Exit codes that a signal explains; 0 always: it may come after the work is done. torchrun has its own, 1.

    A signal that comes before the program has begun ends it as any process.
    """
    if sent in (None, signal.SIGSTOP) or hit is None:
        return {0}
    if hit == SERVER:
        return {0, 2, 1 if ranks > 1 else 2} if sent == signal.SIGKILL else {0}
    codes = {signal.SIGTERM: {143, 85}, signal.SIGUSR1: {138, 85}, signal.SIGINT: {130, 1}, signal.SIGKILL: set[int]()}
    others = {2, 1, 143} if ranks > 1 else set()  # told of it, or ended by the launcher
    return {0, -sent, *codes[sent], *others}


def strike(running: list[int], blow: Blow) -> str | None:
    """Send a signal to one of some processes; what that is."""
    if not running:
        return None
    pid = sorted(running)[int(blow.which * len(running))]
    hit = role(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, blow.number)
        if blow.number == signal.SIGSTOP:
            time.sleep(1.0 + 2.0 * blow.which)
            os.kill(pid, signal.SIGCONT)
    return hit


def one(starts: Starts, rng: random.Random, run: Run, counts: Counter[str]) -> tuple[str, list[str]]:
    """(description, what is wrong) of a start, and if it had a signal of the one after it."""
    ranks, real = rng.choice(run.ranks), rng.random() < 0.1
    workers = rng.choice((0, 0, 1, 1, 4)) if run.workers else 0
    blow = Blow(rng.choice(SIGNALS), rng.uniform(0.0, 4.0 + 3.0 * ranks), rng.random())
    blows = [blow, None] if rng.random() < 1 / 3 else [None]
    work = starts.bench.work
    shutil.rmtree(work, ignore_errors=True)
    shared, problems = set(os.listdir("/dev/shm")), []
    text = f"{run.name}, {ranks} ranks, {workers} workers" + ", as a command" * real
    for again in blows:
        ended = starts.start(run, ranks, workers, again, real)
        counts["starts"] += 1
        sent = again.number if again and ended.hit else None
        if again is not None:
            counts["signals"] += sent is not None
            text += f", {again.number.name} after {again.moment:.1f} s to {ended.hit or 'nobody'}: {ended.codes}"
        if run.name == "export" and "exists and is not empty; choose" in ended.texts[0]:
            continue  # it was finished before the signal
        found = starts.judge(ended, sent)
        problems += [*found, *(text[-1500:] for text in ended.texts)] if found else []
    left = contents(work)
    if not problems and (differ := differences(starts.wholes.setdefault((run.name, ranks), left), left)):
        problems.append("; ".join(differ[:5]))
    if new := [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith(("torch_", "b3"))]:
        problems.append(f"/dev/shm holds {new[:3]}")
    return text, problems


def light(root: Path, options: argparse.Namespace) -> int:
    """Pools without a model, ten to a process."""
    (root / "light.py").write_text(LIGHT)
    started, count = time.monotonic(), 0
    while count < options.starts and time.monotonic() - started < 60 * options.minutes:
        processes.run_python(root / "light.py", "10", timeout=options.limit)
        count += 10
    print(f"{count} pools in {time.monotonic() - started:.0f} s, none hung")
    return 0


def leave(number: int, frame: Any) -> None:
    """Unwinds to whoever has started something, who then ends it."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--runs", default=",".join(RUNS), help="which programs")
    parser.add_argument("--busy", type=int, default=2, help="processes that do nothing but keep a core busy")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a start has hung")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a start")
    parser.add_argument("--light", action="store_true", help="pools without a model, ten to a process")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
    try:
        with tempfile.TemporaryDirectory() as name:
            return light(Path(name), options) if options.light else everything(Path(name), options)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def everything(root: Path, options: argparse.Namespace) -> int:
    CONTEXT.set_forkserver_preload(PRELOAD)
    prepare(root)
    starts, counts, findings, started = Starts(root, options.limit), Counter[str](), 0, time.monotonic()
    names = options.runs.split(",")
    number = 0 if options.only is None else options.only
    while counts["starts"] < options.starts and time.monotonic() - started < 60 * options.minutes:
        rng, run = random.Random(f"{options.seed}/{number}"), RUNS[names[number % len(names)]]
        described, problems = one(starts, rng, run, counts)
        findings += bool(problems)
        print(
            f"start {number} (seed {options.seed}): {described}{': ' * bool(problems)}{'; '.join(problems)}", flush=True
        )
        if options.only is not None:
            break
        number += 1
    seconds = time.monotonic() - started
    print(f"{counts['starts']} starts in {seconds:.0f} s, {counts['signals']} signals, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
