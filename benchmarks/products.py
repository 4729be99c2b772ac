"""GFLOP/s of float32 linear layers on one CPU thread: torch's own, by MKL, and ours, by oneDNN.

    OMP_NUM_THREADS=1 python benchmarks/products.py

Forward, gradient of the input and gradient of the weight, in processor time, the best of five rounds in turn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import linear

from b3.model.products import product

# (rows, in, out): of a 100M model's layers, of its adapters', of MiniLM's, of the demo's student
SHAPES = (
    (3744, 512, 1536),
    (1011, 512, 1024),
    (20, 512, 512),
    (1011, 512, 8),
    (1011, 8, 512),
    (1000, 384, 1536),
    (1000, 128, 256),
)
PASSES = ("forward", "by input", "by weight")


def passes(multiply: Callable[..., torch.Tensor], rows: int, width: int, out: int) -> list[Callable[[], object]]:
    """The three passes, each a call."""
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    by_x = multiply(x.requires_grad_(), weight)
    by_weight = multiply(x.detach(), weight.clone().requires_grad_())
    grad = torch.randn(rows, out)
    return [
        lambda: multiply(x.detach(), weight),
        lambda: by_x.backward(grad, retain_graph=True),
        lambda: by_weight.backward(grad, retain_graph=True),
    ]


def seconds(call: Callable[[], object], repeat: int) -> float:
    started = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - started) / repeat


def main() -> None:
    torch.set_num_threads(1)
    print("| rows, in, out | pass | MKL | oneDNN |\n|---|---|---:|---:|")
    for shape in SHAPES:
        work = 2 * shape[0] * shape[1] * shape[2]
        arms = [passes(multiply, *shape) for multiply in (linear, product)]
        for number, name in enumerate(PASSES):
            best = [float("inf")] * 2
            for _ in range(5):
                for i, arm in enumerate(arms):
                    best[i] = min(best[i], seconds(arm[number], max(3, int(1e9 / work))))
            print(f"| {shape} | {name} | {work / best[0] / 1e9:.0f} | {work / best[1] / 1e9:.0f} |")


if __name__ == "__main__":
    main()
