"""The expected time of a training step on a GPU, from shapes alone: no GPU is needed, a C++ compiler is.

    python -m benchmarks.model_step configs/b3_qwen2vl_2b.yaml [section.key=value ...] [--gemm 620 --bandwidth 2.6 ...]

Every kernel of a chunk is counted at the recipe's real size (`benchmarks.shapes`). A matrix product takes its
operations at the rate of products or, if it is thin, its bytes at the memory's bandwidth; attention its operations at
its own rate; everything else its bytes, and each a launch. What overlaps, the host and the network are left out: the
figures are for comparing two forms of a step, not a promise. The workload is a rank's share of a batch of COCO images
and captions, in so many pairs. MFU is that of metrics.jsonl. --compiled: layers as inductor fuses them
(`benchmarks.shapes.fused`), for `model.compile: auto`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from b3.config import load_config
from benchmarks.shapes import CHECKPOINTS, FOLDER, at_size, measure, whole, why_not
from benchmarks.shapes.fused import compiled, fused_layers


def seconds(kernels: dict[str, list[float]], rates: Any) -> dict[str, float]:
    """Time of a part of the step by kind of kernel, and the number of launches."""
    times = {"gemm": 0.0, "attention": 0.0, "element-wise": 0.0, "launches": 0.0}
    for kind, (count, operations, moved) in kernels.items():
        times["launches"] += count
        by_bytes = moved / (rates.bandwidth * 1e12) + count * rates.launch * 1e-6
        if kind == "gemm":
            times["gemm"] += operations / (rates.gemm * 1e12)
        elif kind == "thin gemm":
            times["gemm"] += by_bytes
        elif kind == "attention":
            times["attention"] += operations / (rates.attention * 1e12)
        else:
            times["element-wise"] += by_bytes
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gemm", type=float, default=620, help="bfloat16 matrix products, TFLOP/s")
    parser.add_argument("--attention", type=float, default=400, help="TFLOP/s")
    parser.add_argument("--bandwidth", type=float, default=2.6, help="of element-wise kernels, TB/s")
    parser.add_argument("--launch", type=float, default=2, help="microseconds a kernel costs beside its bytes")
    parser.add_argument("--peak", type=float, default=989, help="of the card, for MFU, TFLOP/s")
    parser.add_argument("--pairs", type=int, default=128, help="of a rank in a step")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=422, help="of a pair")
    parser.add_argument("--image-tokens", type=int, default=385, help="of a pair")
    parser.add_argument("--compiled", action="store_true", help="layers compiled by inductor")
    rates = parser.parse_intermixed_args()
    problem = why_not()
    if problem is not None:
        parser.error(problem)
    config = load_config(rates.config, rates.overrides)
    facts = json.loads((FOLDER / CHECKPOINTS[config.model.name]).read_text())
    depths = facts["num_hidden_layers"], facts.get("vision_config", {}).get("depth", 0)
    text = {} if depths[1] else {"length": 24, "grid": None}
    cases = at_size(*depths, recipe=rates.config, overrides=rates.overrides, **text)
    results, tokens = measure(cases), config.train.chunk_tokens
    told = whole(results, *depths)
    if rates.compiled:
        told = compiled(results, *depths, fused_layers(rates.config, rates.overrides), tokens)
    show(told, tokens, rates)


def show(told: dict[str, Any], chunk_tokens: int, rates: Any) -> None:
    """Print the tables: parts of a chunk, and the step."""
    print(f"| a chunk of {chunk_tokens:,} tokens, ms | GEMM | attention | element-wise | sum | launches |")
    print("|---|---:|---:|---:|---:|---:|")
    step = flops = 0.0
    for name, kernels in told["parts"].items():
        part = seconds(kernels, rates)
        total = part["gemm"] + part["attention"] + part["element-wise"]
        cells = [f"{1e3 * part[kind]:.0f}" for kind in ("gemm", "attention", "element-wise")]
        print(f"| {name} | {' | '.join(cells)} | {1e3 * total:.0f} | {part['launches']:,.0f} |")
        seen = rates.image_tokens / told["image_tokens"] if "vision" in name else rates.tokens / chunk_tokens
        step += 0.0 if name == "vision, pass 2" and told["vision_frozen"] else rates.pairs * seen * total
    flops = rates.pairs * rates.tokens / chunk_tokens * told["text_flops"]
    if told["image_tokens"]:
        flops += rates.pairs * rates.image_tokens / told["image_tokens"] * told["vision_flops"]
    print(f"\nstep {step:.2f} s, {rates.ranks * rates.pairs / step:.0f} pairs/s on {rates.ranks} ranks,"
          f" MFU {100 * flops / step / rates.peak / 1e12:.1f} %; a chunk adds {told['activations'] / 1e9:.1f} GB to"
          f" {(told['weights'] + told['states']) / 1e9:.1f} GB of weights and states")  # fmt: skip


if __name__ == "__main__":
    main()
