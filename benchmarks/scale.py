"""How time and memory grow with N, part by part: a table, the fitted exponents and a plot.

    python benchmarks/scale.py [--parts plan,mining,...] [--most 1.0] [--plot docs/images/scale.png] [--out FILE.json]

Each point is a process of its own on one thread, so that memory is its own peak; time is that of the processor. The
exponent b is that of time = a N^b, fitted over the points of at least a second (or the last two). --most leaves out
sizes above that share of the largest, --out keeps what was measured and skips it the next time. Parts:

    plan         save, load and walk through one epoch of a plan of N rows (K = 32, |B| = 1,024)
    mining       `mine` of N made-up rows of 32 numbers in clusters, exact
    ivf          the same with `search: ivf`
    candidates   rankings and files of 200 queries over N candidates (vectors of 64 numbers)
    datasets     N data sets of 200 rows: rows, batches of all in one pool, what a run records of them
    tokens       forward and backward of one text of N tokens, tiny model
    batch        collate, and a cached step of N pairs, tiny text encoder
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

Stages = dict[str, float]
K, WORDS = 32, "red square number what is the shape of a blue disc".split()
SIZES = {
    "plan": (100_000, 1_000_000, 10_000_000),
    "mining": (62_500, 125_000, 250_000, 500_000, 1_000_000),
    "ivf": (62_500, 125_000, 250_000, 500_000, 1_000_000),
    "candidates": (1_000, 10_000, 100_000),
    "datasets": (50, 500, 5_000),
    "tokens": (1_000, 3_000, 10_000, 30_000),
    "batch": (1_024, 4_096, 16_384),
}
UNITS = {"candidates": "candidates", "datasets": "data sets", "tokens": "tokens", "batch": "pairs"}


class Watch:
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.stages: Stages = {}
        self.last = time.process_time()

    def __call__(self, name: str) -> None:
        now = time.process_time()
        self.stages[name] = self.stages.get(name, 0.0) + now - self.last
        self.last = now

    def skip(self) -> None:
        """What came before counts for no stage."""
        self.last = time.process_time()


def plan(rows: int, folder: Path) -> Stages:
    from b3.mining.plan import BatchPlan
    from b3.train.sampler import BatchPlanSampler

    order = np.random.default_rng(0).permutation(rows)
    whole = rows // K * K
    made = BatchPlan(order[:whole].reshape(-1, K), order[whole:], manifest={"data_fingerprint": "x"})
    watch = Watch()
    made.save(folder)
    del made, order
    watch("save")
    loaded = BatchPlan.load(folder)
    watch("load")
    sampler = BatchPlanSampler(loaded, 1024)
    watch("sampler")
    seen = sum(len(batch) for batch in sampler)
    watch("epoch")
    assert seen == rows // 1024 * 1024
    sampler.set_epoch(1)
    next(iter(sampler))
    watch("next epoch's first batch")
    return watch.stages


def clusters(rows: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32) queries and targets: centres within centres, a hundred rows around each of the last."""
    rng = np.random.default_rng(0)
    top = rng.normal(size=(max(1, rows // 10_000), 32))
    middle = np.repeat(top, 100, axis=0) + 0.6 * rng.normal(size=(100 * len(top), 32))
    sides = []
    for side in ("queries", "targets"):
        array = np.empty((rows, 32), dtype=np.float32)
        for start in range(0, rows, 1 << 16):
            block = slice(start, min(rows, start + (1 << 16)))
            of = np.arange(block.start, block.stop) % len(middle)
            array[block] = middle[of] + 0.5 * rng.normal(size=(len(of), 32))
        np.save(folder / f"{side}.npy", array)
        sides.append(np.load(folder / f"{side}.npy", mmap_mode="r"))
    return sides[0], sides[1]


def mining(rows: int, folder: Path, **options: Any) -> Stages:
    import b3.mining.miners.anneal
    import b3.mining.search_kernels  # noqa: F401
    from b3.mining import mine

    queries, targets = clusters(rows, folder)
    mine(queries[:8000], targets[:8000], community_size=K, hard_negatives=0)  # compiled code is loaded
    watch = Watch()
    made = mine(queries, targets, community_size=K, hard_negatives=2, **options)
    made.save(folder / "plan")
    watch("in all")
    seconds = made.report["seconds"]
    print({"mined": made.report["mined_negatives_per_query"], "recall": made.report.get("search_recall")}, seconds)
    total = sum(seconds.values())  # of the clock; shared out over the processor's
    return {name: watch.stages["in all"] * value / total for name, value in seconds.items() if value > 0.01 * total}


def ivf(rows: int, folder: Path) -> Stages:
    return mining(rows, folder, search="ivf")


def candidates(count: int, folder: Path) -> Stages:
    from b3.data.items import Item
    from b3.eval.benchmark import Task
    from b3.eval.ranked import RankedQuery, RankedSet
    from b3.eval.ranking import Encoded
    from b3.eval.ranking_report import read_ranking, write_ranking

    rng = np.random.default_rng(0)
    names = [f"page {number}" for number in range(count)]
    queries = [RankedQuery(Item(f"q{i}"), {"cand_names": [], "label_name": names[i % count]}) for i in range(200)]
    vectors = rng.normal(size=(200 + count, 64)).astype(np.float32)
    watch = Watch()
    dataset = RankedSet("pages", queries, {name: Item(name) for name in names}, is_local=False)
    encoded = Encoded(vectors, np.arange(200), 200 + np.arange(count))
    watch("rows")
    write_ranking(folder, Task("pages", "x", metric="ndcg_linear@5"), dataset, encoded, {})
    watch("rank and write")
    assert read_ranking(folder, Task("pages", "x", metric="ndcg_linear@5")) is not None
    return watch.stages


def datasets(count: int, folder: Path) -> Stages:
    import pyarrow as pa

    from b3.data.datasets import PairDataset
    from b3.train.checkpoint import data_facts
    from b3.train.sampler import BatchPlanSampler

    rng = np.random.default_rng(0)
    watch = Watch()
    made = []
    for number in range(count):
        texts = [f"{number} {WORDS[row % 10]} {row}" for row in range(200)]
        empty = [""] * 200
        columns = {"qry": texts, "qry_image_path": empty, "pos_text": texts, "pos_image_path": empty}
        arrays = {name: pa.array(values, pa.large_string()) for name, values in columns.items()}
        made.append(PairDataset(f"set {number}", pa.table(arrays)))
    watch("rows")
    plans = [rng.permutation(200)[:192].reshape(-1, K) for _ in range(count)]
    names, weights = [one.name for one in made], rng.uniform(0.5, 1.5, count).tolist()
    watch.skip()
    apart = BatchPlanSampler(plans, 64, names=names)
    assert sum(map(len, apart)) == 192 * count
    watch("a pool each")
    mixed = BatchPlanSampler(plans, 1024, names=names, weights=weights, pools=[0] * count)
    rows = sum(map(len, mixed))
    watch("one pool, weighted")
    assert rows == mixed.batches_per_epoch * 1024
    data_facts(made, [])
    watch("facts of a run")
    return watch.stages


def tokens(count: int, folder: Path) -> Stages:
    from b3 import Embedder
    from b3.data.items import Item
    from b3.model.backbones.tiny import make_tiny_model
    from b3.train.inputs import StepCollator
    from b3.train.losses.info_nce import InfoNCE
    from b3.train.step import CachedStep

    make_tiny_model(folder, [" ".join(WORDS)] * 50, hidden=32, layers=2, vision_layers=1, vocab_size=400)
    model = Embedder.from_pretrained(folder, dtype="float32")
    model.backbone.requires_grad_(True)
    words = (WORDS * (count // len(WORDS) + 1))[:count]

    class Rows:
        name = "rows"

        def query(self, row: int) -> Item:
            text = " ".join(words)
            return Item(text if row else text + " red")

        def target(self, row: int) -> Item:
            return Item(WORDS[row])

    watch = Watch()
    inputs = StepCollator([Rows()], model.processor, 10**6)([(0, 0)])  # type: ignore[list-item]
    assert inputs.num_tokens >= count
    watch("collate")
    CachedStep(model, InfoNCE())(inputs, 0)
    watch("step")
    return watch.stages


def batch(pairs: int, folder: Path) -> Stages:
    from b3 import Embedder
    from b3.data.items import Item
    from b3.model.backbones.tiny import make_tiny_text_model
    from b3.train.inputs import StepCollator
    from b3.train.losses.info_nce import InfoNCE
    from b3.train.step import CachedStep

    texts = [f"{' '.join(WORDS)} {number}" for number in range(200)]
    make_tiny_text_model(folder, texts, kind="bert", hidden=32, layers=1, heads=2, vocab_size=400)
    model = Embedder.from_pretrained(folder, dtype="float32")
    model.backbone.requires_grad_(True)

    class Rows:
        name = "rows"

        def query(self, row: int) -> Item:
            return Item(f"what is {row}")

        def target(self, row: int) -> Item:
            return Item(f"{WORDS[row % 10]} {row}")

    watch = Watch()
    inputs = StepCollator([Rows()], model.processor, 8192)([(0, row) for row in range(pairs)])  # type: ignore[list-item]
    watch("collate")
    step = CachedStep(model, InfoNCE(0.05, symmetric=True, mask_margin=0.1))
    embed, spent = step._embed, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal spent
        start = time.process_time()
        try:
            return embed(*arguments)
        finally:
            spent += time.process_time() - start

    step._embed = timed  # type: ignore[method-assign]
    whole, losses = step._loss, 0.0

    def loss(*arguments: Any) -> Any:
        nonlocal losses
        start = time.process_time()
        try:
            return whole(*arguments)
        finally:
            losses += time.process_time() - start

    step._loss = loss  # type: ignore[method-assign]
    step(inputs, 0)
    watch("step")
    watch.stages["step"] -= losses
    return {**watch.stages, "loss": losses}


PARTS: dict[str, Callable[[int, Path], Stages]] = {
    "plan": plan, "mining": mining, "ivf": ivf, "candidates": candidates, "datasets": datasets, "tokens": tokens,
    "batch": batch,
}  # fmt: skip


def measure(part: str, size: int) -> dict[str, Any]:
    """One point, in this process."""
    if part in ("tokens", "batch", "mining", "ivf"):
        import torch

        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stages = PARTS[part](size, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": sum(stages.values()), "gib": peak, "stages": {k: round(v, 2) for k, v in stages.items()}}


def point(part: str, size: int) -> dict[str, Any]:
    """The same in a process of its own."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, "1")
    command = [sys.executable, __file__, "--measure", part, str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def exponent(points: dict[int, float], least: float = 1.0) -> float:
    """The slope of log value over log N, over the points of at least `least`; over the last two if fewer are."""
    used = {size: value for size, value in points.items() if value >= least}
    if len(used) < 2:
        used = dict(sorted(points.items())[-2:])
    logs = np.log(np.array(list(used))), np.log(np.array(list(used.values())))
    return float(np.polyfit(*logs, 1)[0])


def table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    lines = ["| part | N | seconds | GiB | exponent of time | where the time goes |", "|---|---:|---:|---:|---:|---|"]
    for part, points in found.items():
        slope = exponent({n: p["seconds"] for n, p in points.items()}) if len(points) > 1 else float("nan")
        for n, p in points.items():
            stages = ", ".join(f"{k} {v:.1f}" for k, v in p["stages"].items())
            unit = UNITS.get(part, "rows")
            last = f"{slope:.2f}" if n == max(points) else ""
            lines.append(f"| {part} | {n:,} {unit} | {p['seconds']:.1f} | {p['gib']:.2f} | {last} | {stages} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[int, dict[str, Any]]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("seconds", "gib"), ("processor seconds", "peak memory, GiB"), strict=True):
        for part, points in found.items():
            slope = exponent({n: p["seconds"] for n, p in points.items()}) if len(points) > 1 else float("nan")
            name = f"{part}: N^{slope:.2f}" if key == "seconds" else part
            axis.loglog(list(points), [p[key] for p in points.values()], "o-", markersize=3, linewidth=1, label=name)
        axis.set_xlabel("N")
        axis.set_ylabel(label)
        axis.grid(True, which="major", linewidth=0.3)
        if key == "seconds":
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--most", type=float, default=1.0, help="share of the largest size, per part")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    known = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for part in arguments.parts.split(","):
        for size in (n for n in SIZES[part] if n <= arguments.most * max(SIZES[part])):
            if str(size) not in known.setdefault(part, {}):
                known[part][str(size)] = point(part, size)
                print(part, size, known[part][str(size)], flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(known, indent=1) + "\n")
    found = {part: {n: points[str(n)] for n in sorted(map(int, points))} for part, points in known.items()}
    print(f"\n{table(found)}")
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
