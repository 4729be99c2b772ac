"""Partitioners on a real teacher graph, ranking against faiss, and memory: one table.

    python benchmarks/mining.py --wordnet DIR [--parts partition,sizes,swaps,rank,memory,emoji] [--rounds 3]

WordNet lemma -> definition, 100,000 rows, MiniLM, 384 dimensions (benchmarks/wordnet.py makes DIR), p = 30, m = 100.
Each row of the tables is a process of its own, so that memory is its own peak. faiss is IndexFlatIP on as many threads;
ranking is timed on a part of the queries, arms in turn, and scaled; it and the swaps in processor time. Further rows
for the memory test are noisy copies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

PARTITIONS: dict[str, dict[str, Any]] = {
    "random": {"partitioner": "random"},
    "balanced k-means": {"partitioner": "kmeans"},
    "paper (mutual, k-way, authors' repair)": {"partitioner": "paper"},
    "anneal, no veto": {"veto": False},
    "anneal (default)": {},
    "anneal, mutual edges": {"edges": "mutual"},
    "anneal, 12 passes": {"refine_passes": 12},
    "anneal, 100 passes": {"refine_passes": 100},
    "anneal, 4 pieces": {"piece_rows": 25_000},
    "anneal, 16 pieces": {"piece_rows": 6_400},
}
SIZES = (8, 32, 64, 512)


def measure_partition(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One plan: quality, seconds of the cut, peak memory."""
    from b3.files import Stages
    from b3.mining import mine

    queries, targets = (np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("queries", "targets"))
    plan = mine(
        queries,
        targets,
        hard_negatives=0,
        stages=Stages(folder / f"stages-{options.get('community_size', 32)}"),
        **options,
    )
    report = plan.report
    assert np.bincount(plan.communities.ravel()).max() == 1
    return {
        "mined": report["mined_negatives_per_query"],
        "top": report["skipped_ranks_per_query"],
        "mass": report["teacher_mass_captured"],
        "graph": report["seconds"].get("graph", 0.0) + report["seconds"].get("pieces", 0.0),
        "cut": report["seconds"].get("partition", 0.0) + report["seconds"].get("refine", 0.0),
        "gib": report["peak_memory_bytes"] / 2**30,
    }


def measure_swaps(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Processor time of the swaps of one plan, with all that they prepare, once the compiled code is loaded."""
    from b3.files import Stages
    from b3.mining import mine

    queries, targets = (np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("queries", "targets"))
    stages, times = Stages(folder / "stages-32"), []
    (stages.folder / "communities.npz").unlink(missing_ok=True)

    def progress(stage: str, done: int, of: int) -> None:
        if stage == "refine":
            times.append(time.process_time())

    mine(queries[:2000], targets[:2000], hard_negatives=0)
    plan = mine(queries, targets, hard_negatives=0, stages=stages, progress=progress, **options)
    digest = hashlib.sha256(plan.communities.tobytes()).hexdigest()[:16]
    return {"seconds": times[-1] - times[0], "plan": digest, "load": os.getloadavg()[0]}


def measure_rank(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Top 130 of all rows by one arm: ours by kind of product, or faiss; a part of the queries, scaled."""
    from b3.mining.vectors import unit_rows

    queries, targets = (unit_rows(np.load(folder / f"{s}.npy", mmap_mode="r"), s) for s in ("queries", "targets"))
    count = options["queries"]
    queries = queries[:: len(queries) // count][:count]
    if options["arm"] == "faiss":
        import faiss

        index = faiss.IndexFlatIP(queries.shape[1])
        index.add(targets)
        index.search(queries[:64], 130)
        start = time.process_time()
        _, ids = index.search(queries, 130)
    else:
        from b3.mining.search import TileSearch

        search = TileSearch(targets, 130, options["arm"])
        search(queries[:64])
        start = time.process_time()
        ids = np.concatenate([search(queries[i : i + 1024])[0] for i in range(0, count, 1024)])
    seconds = (time.process_time() - start) * len(targets) / count
    return {"seconds": seconds, "ids": np.asarray(ids[:256]).tolist()}


def measure_memory(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A plan of `rows` rows: WordNet's, and noisy copies of them."""
    from b3.mining import mine

    rng = np.random.default_rng(0)
    sides = []
    for side in ("queries", "targets"):
        first = np.load(folder / f"{side}.npy")
        copies = [first] + [
            (first + 0.03 * rng.standard_normal(first.shape, dtype=np.float32))
            for _ in range(options["rows"] // len(first) - 1)
        ]
        np.save(folder / f"large-{side}.npy", np.concatenate(copies))
        sides.append(np.load(folder / f"large-{side}.npy", mmap_mode="r"))
    del copies, first
    plan = mine(*sides, hard_negatives=0)
    for side in ("queries", "targets"):
        (folder / f"large-{side}.npy").unlink()
    seconds = plan.report["seconds"]
    return {
        "mined": plan.report["mined_negatives_per_query"],
        "seconds": seconds,
        "gib": plan.report["peak_memory_bytes"] / 2**30,
    }


def measure_emoji(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """All embedded subsets by one partitioner at K = 8: mean of mined negatives and of equal targets."""
    from b3.data.tables import embedded_teacher
    from b3.mining import mine

    found = []
    for subset, p, m in (
        ("emoji_t2i", 4, 50),
        ("emoji_i2t", 4, 50),
        ("emoji_i2i", 4, 50),
        ("emoji_cls", 1, 20),
        ("emoji_vqa", 4, 50),
        ("emoji_vg", 4, 50),
    ):
        plan = mine(*embedded_teacher("emoji", subset), p=p, m=m, community_size=8, hard_negatives=0, **options)
        r = plan.report
        found.append(
            (
                r["mined_negatives_per_query"],
                r["skipped_ranks_per_query"],
                r["duplicate_targets_in_community"],
                sum(r["seconds"].values()) - r["seconds"]["report"],
            )
        )
    return dict(zip(("mined", "top", "equal", "seconds"), np.mean(found, axis=0).tolist(), strict=True))


def run(kind: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--wordnet", str(folder), "--measure", kind, "--options", json.dumps(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def partition_row(name: str, found: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{found['mined']:.2f}",
        f"{found['top']:.2f}",
        f"{100 * found['mass']:.1f} %",
        f"{found['graph']:.1f}",
        f"{found['cut']:.1f}",
        f"{found['gib']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True)
    parser.add_argument("--parts", default="partition,sizes,swaps,rank,memory,emoji")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--queries", type=int, default=8192, help="of the ranking comparison; seconds are scaled to all"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, parts = arguments.wordnet, arguments.parts.split(",")
    if arguments.measure:
        print(json.dumps(globals()[f"measure_{arguments.measure}"](folder, arguments.options)))
        return
    print(f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n")
    head = ["", "mined negatives per query", "above the window", "teacher mass", "graph s", "cut s", "peak GiB"]
    if "partition" in parts:
        print("K = 32\n")
        table(head, [partition_row(name, run("partition", folder, options)) for name, options in PARTITIONS.items()])
    if "sizes" in parts:
        table(
            ["K", *head[1:]],
            [
                partition_row(
                    f"{size}, {name}", run("partition", folder, {"community_size": size, "partitioner": name})
                )
                for size in SIZES
                for name in ("random", "paper", "anneal")
            ],
        )
    if "swaps" in parts:
        times = [run("swaps", folder, {}) for _ in range(arguments.rounds)]
        table(
            ["swaps, K = 32", "processor s", "plan", "load"],
            [[f"{i + 1}", f"{t['seconds']:.1f}", t["plan"], f"{t['load']:.1f}"] for i, t in enumerate(times)],
        )
    if "rank" in parts:
        arms = ("bfloat16", "int8", "float32", "faiss")
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for _ in range(arguments.rounds):
            for arm in arms:
                found[arm].append(run("rank", folder, {"arm": arm, "queries": arguments.queries}))
        medians = {arm: statistics.median(f["seconds"] for f in found[arm]) for arm in arms}
        same = {
            arm: np.mean(
                [set(a) == set(b) for a, b in zip(found[arm][0]["ids"], found["faiss"][0]["ids"], strict=True)]
            )
            for arm in arms
        }
        table(
            ["ranking, top 130 of 100,000", "s (median)", "of faiss", "queries with the same 130 as faiss"],
            [
                [arm, f"{medians[arm]:.1f}", f"{medians[arm] / medians['faiss']:.2f}", f"{100 * same[arm]:.1f} %"]
                for arm in arms
            ],
        )
    if "memory" in parts:
        found_rows = []
        for rows in (100_000, 200_000):
            m = run("memory", folder, {"rows": rows})
            found_rows.append(
                [
                    f"{rows:,}",
                    f"{m['mined']:.2f}",
                    f"{m['gib']:.2f}",
                    ", ".join(f"{k} {v:.1f}" for k, v in m["seconds"].items()),
                ]
            )
        table(["rows", "mined negatives per query", "peak GiB", "seconds"], found_rows)
    if "emoji" in parts:
        names = ("random", "kmeans", "paper", "anneal")
        rows = [(name, run("emoji", folder, {"partitioner": name})) for name in names]
        table(
            ["embedded data, K = 8", "mined negatives per query", "above the window", "equal targets", "s per subset"],
            [
                [name, f"{r['mined']:.2f}", f"{r['top']:.2f}", f"{r['equal']:.3f}", f"{r['seconds']:.1f}"]
                for name, r in rows
            ],
        )


if __name__ == "__main__":
    main()
