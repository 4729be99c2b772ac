"""Mining of classification data: by distinct labels (default), by 30 % of the labels (the paper's scripts), at random.

    python benchmarks/classification.py [--rows 10000] [--labels 20 100 397 1000] [--noise 0.7] [--out FILE.json]

Synthetic labels: points around 1 centre for every 8 labels, so that each label has confusable neighbours; a query is
its label's point with noise, as a teacher would place it. Columns, K = 32, means over queries:
near: other members whose label is among the query's 10 nearest wrong ones (a measure that neither graph optimises);
labels: distinct other labels among them; copies: other members with the query's own label, which are no negatives;
drawn: hard negatives (h = 5) that are real, and how many distinct ones a community gets; right: share of them that are
the label of another member, wrong to push away.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from b3.mining import BatchPlan, mine
from b3.mining.vectors import distinct_targets, unit_rows

K, H, NEAR = 32, 5, 10
Numbers = dict[str, float]


def synthetic(rows: int, labels: int, noise: float, dim: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(queries, targets), each (N, D) float32; targets are the points of the rows' labels."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, labels // 8), dim))
    points = centres[np.arange(labels) % len(centres)] + 0.6 * rng.normal(size=(labels, dim))
    targets = points[rng.integers(0, labels, rows)]
    return (targets + noise * rng.normal(size=(rows, dim))).astype(np.float32), targets.astype(np.float32)


def measure(plan: BatchPlan, queries: np.ndarray, targets: np.ndarray) -> Numbers:
    """The columns of the table."""
    distinct = distinct_targets(unit_rows(targets, "targets"))
    scores = unit_rows(queries, "queries") @ distinct.vectors.T
    scores[np.arange(len(queries)), distinct.of_row] = -np.inf
    near = np.argsort(-scores, axis=1)[:, : min(NEAR, max(1, len(distinct) // 3))]
    sums = np.zeros(3)
    drawn = distinct_drawn = right = 0
    assert plan.hard_negatives is not None
    for members in plan.communities:
        labels = distinct.of_row[members]
        for row in members:
            hits = labels[np.isin(labels, near[row])]
            sums += len(hits), len(np.unique(hits)), (labels == distinct.of_row[row]).sum() - 1
        given = plan.hard_negatives[members]
        given = distinct.of_row[given[given >= 0]]
        drawn, distinct_drawn = drawn + len(given), distinct_drawn + len(np.unique(given))
        right += int(np.isin(given, labels).sum())
    count = plan.communities.size
    return {
        "near": sums[0] / count,
        "labels": sums[1] / count,
        "copies": sums[2] / count,
        "drawn": drawn / count,
        "drawn_distinct": distinct_drawn / len(plan.communities),
        "right": right / max(1, drawn),
    }


def plans(rows: int, labels: int) -> dict[str, dict[str, Any]]:
    """Arguments of `mine` by name; p = 0, and the m of the recipes for classification: 30 % of the labels."""
    own = {"p": 0, "m": -(-3 * labels // 10)}
    return {
        "distinct": own,
        "distinct, m 10": {"p": 0, "m": min(10, labels - 1)},
        "distinct, m 31": {"p": 0, "m": min(31, labels - 1)},
        "label30, paper": {"preset": "paper", "classification": True},
        "random": {"partitioner": "random", **own},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 100, 397, 1000])
    parser.add_argument("--noise", type=float, default=0.7)
    parser.add_argument("--only", nargs="+", default=None, help="names of rows of the table")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    found = []
    columns = ("near", "labels", "copies", "drawn", "dist.", "right")
    print(f"{'labels':>6}  {'mined':16} " + " ".join(f"{name:>6}" for name in columns) + "    s")
    for labels in arguments.labels:
        queries, targets = synthetic(arguments.rows, labels, arguments.noise)
        for name, options in plans(arguments.rows, labels).items():
            if arguments.only and name not in arguments.only:
                continue
            start = time.perf_counter()
            plan = mine(queries, targets, community_size=K, hard_negatives=H, **options)
            seconds = time.perf_counter() - start
            numbers = measure(plan, queries, targets)
            print(
                f"{labels:>6}  {name:16} " + " ".join(f"{v:>6.2f}" for v in numbers.values()) + f" {seconds:>4.0f}",
                flush=True,
            )
            found.append({"labels": labels, "mined": name, **numbers, "seconds": seconds})
    if arguments.out:
        machine = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
        arguments.out.write_text(json.dumps(machine | {"rows": arguments.rows, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
