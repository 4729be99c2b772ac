"""Kills every program at random moments, runs the same command again, and compares all that it leaves.

    python tests/hardening/crash.py [--kills 200] [--minutes M] [--runs mining,export] [--seed 0]
    python tests/hardening/crash.py --only 17 --seed 0                one case again

A case is a function of (seed, number): a program, a number of ranks and workers, and moments drawn over the time that
it takes uninterrupted. At each moment SIGKILL goes to all its processes; half of the cases are killed twice. The last
run must end with exit code 0 and the files of the uninterrupted one, byte by byte, but for what `paths.TIMED` names.
Processes are forked from a server that has imported everything, so that moments fall into the program's own work. Not
part of `make test`. Exit code 1 if there is any finding.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import CONTEXT, RUNS, Job, Run, contents, differences, forks, prepare, processes

LIMIT = 300.0  # seconds
PRELOAD = [*forks.PRELOAD, "surroundings", "__main__"]


class Bench:
    """Starts runs below `root`, always in the folder `root`/work, so that no path differs."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root, root / "work"
        self.wholes: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}
        self.sizes: dict[tuple[str, int], list[int]] = {}  # of the files that are left

    def start(
        self, run: Run, ranks: int, workers: int, around: Callable[[int], None] | None = None, logs: str = "logs"
    ) -> tuple[Job, str]:
        """Start a run, in other surroundings if given (`surroundings`): its ranks, and the mark of what they start."""
        mark = uuid.uuid4().hex
        arguments = run.command(self.root, self.work, workers)
        variables = {processes.MARK: mark, "TMPDIR": str(self.root / "tmp")}
        how = {"ranks": ranks, "program": run.program, "variables": variables, "prepare": around}
        return Job(self.root / logs, *arguments, draws=True, **how), mark  # type: ignore[arg-type]

    def finish(self, run: Run, ranks: int, workers: int) -> str | None:
        """Run to the end; what is wrong, or None."""
        job, mark = self.start(run, ranks, workers)
        codes = job.wait(LIMIT)
        left = processes.end(mark, grace=10.0)
        if run.name == "export" and codes == [2] and "exists and is not empty; choose" in job.text():
            return None  # it was finished before; its bytes are compared
        if codes != [0] * ranks:
            return f"exit codes {codes}: " + " | ".join(job.text(rank)[-500:] for rank in range(ranks))
        return f"left {len(left)} processes" if left else None

    def whole(self, run: Run, ranks: int) -> tuple[dict[str, Any], float]:
        """What an uninterrupted run leaves, and its seconds."""
        if (run.name, ranks) not in self.wholes:
            shutil.rmtree(self.work, ignore_errors=True)
            started = time.monotonic()
            problem = self.finish(run, ranks, 0)
            assert problem is None, f"{run.name}: {problem}"
            self.wholes[run.name, ranks] = contents(self.work), time.monotonic() - started
            files = [path for path in self.work.rglob("*") if path.is_file()]
            self.sizes[run.name, ranks] = [path.stat().st_size for path in files]
        return self.wholes[run.name, ranks]

    def case(self, rng: random.Random, run: Run) -> tuple[str, int, str | None]:
        """(description, kills, what is wrong or None)."""
        ranks, workers = rng.choice(run.ranks), rng.choice((0, 0, 0, 1)) if run.workers else 0
        whole, seconds = self.whole(run, ranks)
        shutil.rmtree(self.work, ignore_errors=True)
        kills, moments = 0, [rng.uniform(0, seconds) for _ in range(rng.choice((1, 2)))]
        for moment in moments:
            job, mark = self.start(run, ranks, workers)
            time.sleep(moment)
            kills += any(process.is_alive() for process in job.processes)
            job.kill()
            processes.end(mark)
            job.wait()
        problem = self.finish(run, ranks, workers)
        if problem is None and (found := differences(whole, contents(self.work))):
            problem = "; ".join(found[:5])
        shown = " and ".join(f"{moment:.2f}" for moment in moments)
        return f"{run.name}, {ranks} ranks, {workers} workers, killed after {shown} of {seconds:.2f} s", kills, problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--runs", default=",".join(RUNS), help="which programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a case")
    options = parser.parse_args()
    names, kills, findings = options.runs.split(","), Counter[str](), 0
    started = time.monotonic()
    CONTEXT.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        (bench.root / "tmp").mkdir()
        prepare(bench.root)
        number = 0 if options.only is None else options.only
        while kills.total() < options.kills and time.monotonic() - started < 60 * options.minutes:
            rng = random.Random(f"{options.seed}/{number}")
            run = RUNS[names[number % len(names)]]
            described, count, problem = bench.case(rng, run)
            kills[run.name] += count
            if problem is not None or options.only is not None:
                findings += problem is not None
                print(f"case {number} (seed {options.seed}): {described}: {problem or 'as uninterrupted'}", flush=True)
            if options.only is not None:
                break
            number += 1
            if number % len(names) == 0:
                print(f"{kills.total()} kills in {time.monotonic() - started:.0f} s, {findings} findings", flush=True)
        left = list((bench.root / "tmp").iterdir())
    for name in names:
        print(f"{name:20} {kills[name]:>5} kills")
    print(f"{kills.total()} kills, {findings} findings, {len(left)} temporary files left")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
