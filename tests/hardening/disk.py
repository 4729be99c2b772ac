"""Disks that are full, read-only, shared, moved or late, and clocks that jump, for every program.

    python tests/hardening/disk.py [--cases 200] [--minutes M] [--runs mining,export] [--kinds full,two] [--seed 0]
    python tests/hardening/disk.py --only 17 --seed 0                 one case again

full      the folder is a small tmpfs, of every size (where mounting is not allowed: files have a limit of size)
readonly  the folder is read-only, from the start or since a kill
two       the same command twice at once: both end well, or one says who has the folder
moved     killed, its folder moved, and continued there
clock     the time of day jumps back, also to 1970
late      ranks other than the first see new files three seconds late
power     the power fails at some moment: what was not synced is lost, or not (`tests/power.py`)

A program ends well, or with exit code 2 and one line; then the same command without the trouble ends with the files of
an uninterrupted run. Not part of `make test`. Exit code 1 if there is any finding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from crash import LIMIT, PRELOAD, Bench
from paths import CONTEXT, RUNS, Job, Run, contents, differences, prepare, processes
from power import Moment, Tree
from surroundings import Clock, Late, Power, SmallFiles, is_one_line

PAGE = 4096
REFUSED = "refused"
KINDS = ("full", "readonly", "two", "moved", "clock", "late", "power")


def mount(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    while os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=False, capture_output=True)
        time.sleep(0.05)


class Cases:
    def __init__(self, bench: Bench) -> None:
        self.bench, self.work = bench, bench.work
        self.moments: dict[str, list[Moment]] = {}
        self.refused = False  # whether a program of the last case has ended with exit code 2
        unmount(self.work)
        self.can_mount = mount(self.work, "-o", "size=64k")
        unmount(self.work)

    def case(self, rng: random.Random, run: Run, kind: str) -> tuple[str, str | None]:
        """(description, what is wrong or None)."""
        ranks = rng.choice(run.ranks)
        if kind == "power":
            run, ranks = run if 1 in run.ranks else RUNS["training"], 1
        if kind == "late":
            ranks = rng.choice([r for r in run.ranks if r > 1] or run.ranks)
        whole, seconds = self.bench.whole(run, ranks)
        shutil.rmtree(self.work, ignore_errors=True)
        self.refused = False
        does: Callable[..., str | None] = getattr(self, kind)
        try:
            problem = does(rng, run, ranks, seconds)
            if problem is None and not (kind == "power" or self.is_over(run)):
                problem = self.bench.finish(run, ranks, 0)
            if problem == REFUSED:
                problem = None
            elif problem is None and (found := differences(whole, contents(self.work))):
                problem = "; ".join(found[:5])
        finally:
            unmount(self.work)
        return f"{kind}, {run.name}, {ranks} ranks", problem

    def is_over(self, run: Run) -> bool:
        """Whether the same command would refuse its own folder, as it is finished."""
        return (run.name == "export" and (self.work / "exported").exists()) or (
            run.name == "mining-arrays" and (self.work / "plan" / "manifest.json").exists()
        )

    def ends_well(self, job: Job, mark: str, ranks: int) -> str | None:
        codes = job.wait(LIMIT)
        left = processes.end(mark, grace=10.0)
        self.refused |= 2 in codes
        texts = [job.text(rank) for rank in range(ranks)]
        if left:
            return f"left {len(left)} processes"
        if any(code not in (0, 2) for code in codes):
            return f"exit codes {codes}: " + " | ".join(text[-800:] for text in texts)
        strange = [text for code, text in zip(codes, texts, strict=True) if code == 2 and not is_one_line(text)]
        return f"exit codes {codes}: {strange[0][-800:]}" if strange else None

    def full(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        files = self.bench.sizes[run.name, ranks]
        pages = sum(-(-size // PAGE) for size in files) + 8
        size = rng.randint(1, pages)
        if not self.can_mount:
            job, mark = self.bench.start(run, ranks, 0, SmallFiles(max(rng.choice(files) - 1, 0)))
            return self.ends_well(job, mark, ranks)
        mount(self.work, "-o", f"size={size * PAGE}")
        problem = self.ends_well(*self.bench.start(run, ranks, 0), ranks)
        subprocess.run(["mount", "-o", "remount,size=1g", str(self.work)], check=True)
        return problem and f"{size} of {pages} pages: {problem}"

    def readonly(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        if not self.can_mount:
            return None
        mount(self.work, "-o", "size=1g")
        if rng.random() < 0.5:
            self.killed(rng, run, ranks, seconds)
        subprocess.run(["mount", "-o", "remount,ro", str(self.work)], check=True)
        problem = self.ends_well(*self.bench.start(run, ranks, 0), ranks)
        subprocess.run(["mount", "-o", "remount,rw", str(self.work)], check=True)
        return problem

    def two(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        first, mark = self.bench.start(run, ranks, 0)
        time.sleep(rng.uniform(0, seconds) if rng.random() < 0.7 else 0.0)
        second, other_mark = self.bench.start(run, ranks, 0, logs="other")
        problems = [self.ends_well(first, mark, ranks), self.ends_well(second, other_mark, ranks)]
        return next((problem for problem in problems if problem), None)

    def killed(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> None:
        job, mark = self.bench.start(run, ranks, 0)
        time.sleep(rng.uniform(0, seconds))
        job.kill()
        processes.end(mark)
        job.wait()

    def moved(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        elsewhere = self.work.with_name("elsewhere")
        shutil.rmtree(elsewhere, ignore_errors=True)
        self.bench.work = elsewhere
        try:
            self.killed(rng, run, ranks, seconds)
        finally:
            self.bench.work = self.work
        if elsewhere.exists():
            elsewhere.rename(self.work)
        return None

    def clock(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        job, mark = self.bench.start(run, ranks, 0, Clock())
        problem = self.ends_well(job, mark, ranks)
        return problem or (None if all(p.exitcode == 0 for p in job.processes) else job.text()[-800:])

    def power(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        if run.name not in self.moments:
            file = self.bench.root / "moments"
            job, mark = self.bench.start(run, 1, 0, Power(str(self.work), str(file)))
            if problem := self.ends_well(job, mark, 1):
                return problem
            self.moments[run.name] = pickle.loads(file.read_bytes())
            shutil.rmtree(self.work)
        moment = rng.choice(self.moments[run.name])
        Tree.of(moment, rng.choice(("synced", "named", "mixed", "mixed")), rng).write(self.work)
        job, mark = self.bench.start(run, 1, 0)
        problem = self.ends_well(job, mark, 1)
        if problem is None and job.processes[0].exitcode == 2:
            return REFUSED  # in one line
        return problem and f"after {moment.call}: {problem}"

    def late(self, rng: random.Random, run: Run, ranks: int, seconds: float) -> str | None:
        if rng.random() < 0.5:
            self.killed(rng, run, ranks, seconds)
        job, mark = self.bench.start(run, ranks, 0, Late(str(self.work)))
        problem = self.ends_well(job, mark, ranks)
        return problem or (None if all(p.exitcode == 0 for p in job.processes) else job.text()[-800:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--runs", default=",".join(RUNS), help="which programs")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which troubles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a case")
    options = parser.parse_args()
    names, kinds = options.runs.split(","), options.kinds.split(",")
    counts, findings, started = Counter[str](), 0, time.monotonic()
    CONTEXT.set_forkserver_preload(PRELOAD)
    with contextlib.ExitStack() as held:
        bench = Bench(Path(held.enter_context(tempfile.TemporaryDirectory())))
        held.callback(unmount, bench.work)
        (bench.root / "tmp").mkdir()
        prepare(bench.root)
        cases = Cases(bench)
        numbers = range(options.cases) if options.only is None else [options.only]
        for number in numbers:
            if time.monotonic() - started > 60 * options.minutes:
                break
            rng = random.Random(f"{options.seed}/{number}")
            run, kind = RUNS[rng.choice(names)], kinds[number % len(kinds)]
            described, problem = cases.case(rng, run, kind)
            counts[kind] += 1
            counts[f"{kind}, refused"] += cases.refused
            if problem is not None or options.only is not None:
                findings += problem is not None
                print(f"case {number} (seed {options.seed}): {described}: {problem or 'as it should'}", flush=True)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} cases in {time.monotonic() - started:.0f} s, {findings} findings", flush=True)
    for kind in kinds:
        print(f"{kind:10} {counts[kind]:>5} cases, {counts[f'{kind}, refused']} with a program that said no")
    mounted = "" if cases.can_mount else "; nothing could be mounted"
    print(f"{sum(counts[kind] for kind in kinds)} cases, {findings} findings{mounted}")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
