"""Execute what a grid lacks: plans first, then runs, a process each, as many at a time as there are cores.

A finished run leaves results/KEY.json and results/KEY.npz (the rank of every held-out query's answer) below the grid's
root; a second call starts where the first one ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.evidence.grid import Run

READY = ("mined_precision", "random_precision")  # what train.py finds after its first hundred steps
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _quiet() -> None:
    import contextlib
    import logging
    import sys

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with contextlib.suppress(OSError):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process


def mine_plans(run: Run) -> float:
    """Mine the plans of a run; seconds, also kept in its folder."""
    from b3.mining.recipe import mine_recipe

    _quiet()
    config, started = run.config(), time.perf_counter()
    mine_recipe(config)
    seconds = time.perf_counter() - started
    (Path(config.mining.dir) / "seconds.json").write_text(json.dumps(seconds))
    return seconds


def execute(run: Run) -> str:
    """Train, measure and record one run; its key."""
    import numpy as np

    from b3.train.checkpoint import RESULT, read_metrics
    from b3.train.run import train
    from benchmarks.evidence.measure import batch_facts, bed_ranks, emoji_ranks

    _quiet()
    config, key = run.config(), run.key
    folder = Path(config.output_dir)
    trained = train(config)
    kind, _, place = config.data.source.partition(":")
    is_bed = kind == "jsonl"
    ranks = bed_ranks(str(folder), Path(place)) if is_bed else emoji_ranks(config)
    facts: dict[str, Any] = dict(batch_facts(config, Path(place))) if is_bed else {}
    if config.batch.mined:
        reports = [json.loads(f.read_text()) for f in sorted(Path(config.mining.dir).glob("*/report.json"))]
        hits = [report["mined_negatives_per_query"] for report in reports]
        facts["in_community"] = float(np.average(hits, weights=[report["n"] for report in reports]))
    lines = read_metrics(folder)
    last = lines[-1]
    facts |= {key: line[key] for line in read_metrics(folder, READY[0]) for key in READY}
    known = json.loads((folder / RESULT).read_text())["random_steps"]
    facts["random_steps"] = config.train.steps if known is None else known
    record = {
        "key": key,
        "recipe": run.recipe,
        "overrides": list(run.overrides),
        "seed": run.seed,
        "facts": facts,
        "in_batch_precision": last["in_batch_precision"],
        "loss": last["loss"],
        "train_seconds": trained.seconds,
        "mine_seconds": _mining_seconds(Path(config.mining.dir)) if config.needs_plan else 0.0,
    }
    results = Path(run.root) / "results"
    results.mkdir(exist_ok=True)
    np.savez_compressed(results / f"{key}.npz", **{name: value.astype(np.uint16) for name, value in ranks.items()})
    (results / f"{key}.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder)
    return key


def _mining_seconds(folder: Path) -> float:
    file = folder / "seconds.json"
    return float(json.loads(file.read_text())) if file.exists() else 0.0


def _guarded(work: Callable[[Run], Any], run: Run) -> str | None:
    """The traceback of what went wrong, or None."""
    try:
        work(run)
    except BaseException:  # a run that fails must not take the others with it
        return traceback.format_exc()
    return None


def execute_missing(runs: Iterable[Run], workers: int, say: Callable[[str], None] = print) -> list[str]:
    """Run what has no result yet; returns descriptions of what failed."""
    unique = {run.key: run for run in runs}
    root = {run.root for run in unique.values()}
    assert len(root) == 1, "one root a grid"
    results = Path(next(iter(root))) / "results"
    missing = [run for key, run in unique.items() if not (results / f"{key}.json").exists()]
    missing.sort(key=lambda run: run.seed)  # all arms of a seed before the next one
    plans = {run.plan_key: run for run in missing if run.plan_key is not None}
    plans = {key: run for key, run in plans.items() if not (Path(run.config().mining.dir) / "seconds.json").exists()}
    say(f"{len(unique)} runs, {len(missing)} missing; {len(plans)} plans to mine; {workers} at a time")
    failed = _all(mine_plans, list(plans.values()), workers, "plan", say)
    return failed + _all(execute, missing, workers, "run", say)


def _all(work: Callable[[Run], Any], runs: list[Run], workers: int, what: str, say: Callable[[str], None]) -> list[str]:
    os.environ.update(THREADS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["b3.train.loop", "b3.train.run", "b3.mining.recipe"])
    failed, started = [], time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(_guarded, work, run): run for run in runs}
        for done, future in enumerate(as_completed(futures), start=1):
            run, problem = futures[future], future.result()
            name = " ".join(f"{axis}={value}" for axis, value in run.labels) + f" seed={run.seed}"
            if problem is not None:
                failed.append(f"{what} {name}: {problem}")
            rest = (time.perf_counter() - started) / done * (len(runs) - done)
            say(f"{what} {done}/{len(runs)} {'FAILED ' if problem else ''}{name} ({rest / 60:.0f} min to go)")
    return failed
