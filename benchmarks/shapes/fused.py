"""What lies between matrix products and attention of a compiled layer: kernels and their bytes, as inductor fuses them.

A text layer and a vision block of a recipe's real size are traced on the CPU, with torch's operator for packed
attention, and lowered by inductor up to its scheduler, which decides what becomes one kernel and what is read and
written in between; no kernel is compiled. Bytes are linear in the number of tokens: two numbers are measured, the rest
follows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.shapes import FOLDER, whole

SIZES = (256, 512)  # tokens
PARTS = ("vision, pass 1", "pass 1", "pass 2", "backward")
KEPT = ("gemm", "thin gemm", "attention")  # kinds of kernels that are no matter of fusing


def fused_layers(recipe: str, overrides: list[str]) -> dict[str, list[list[float]]]:
    """By part of a step [kernels, bytes] of one layer, at each of `SIZES`; in a process of its own.

    Of the tower the sizes are in patches. The backward pass is the text layer's.
    """
    root = FOLDER.parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "benchmarks.shapes.fused", recipe, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def compiled(
    results: list[dict[str, Any]], layers: int, vision_layers: int, found: dict[str, list[list[float]]], tokens: int
) -> dict[str, Any]:
    """As `whole`, with compiled layers: all but the last one of the text model, which stays as it is.

    found: of `fused_layers`. tokens: of a chunk.
    """
    told, rest = whole(results, layers, vision_layers), whole(results, 1, 0)
    for name, kernels in told["parts"].items():
        if name not in found:
            continue
        is_vision = name.startswith("vision")
        size, number = (4 * told["image_tokens"], vision_layers) if is_vision else (tokens, layers - 1)
        (count, least), (_, most) = found[name]
        moved = least + (most - least) * (size - SIZES[0]) / (SIZES[1] - SIZES[0])
        kept = {kind: kernels[kind] for kind in kernels if kind in KEPT}
        others = {kind: entry for kind, entry in rest["parts"][name].items() if kind not in KEPT}
        told["parts"][name] = {**others, **kept, "fused": [number * count, 0.0, number * moved]}
    return told


def _count(recipe: str, overrides: list[str]) -> dict[str, list[list[float]]]:
    """The same, in this process, whose torch it changes."""
    import numpy as np
    import torch
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import FusedSchedulerNode, SchedulerNode
    from torch.nn.attention import varlen

    from b3.config import load_config
    from b3.model.adapter import under_autocast
    from b3.model.batch import Batch
    from benchmarks.shapes.claimed import build

    class Counted(Exception):
        """Thrown where a kernel would be compiled."""

    graphs: list[list[float]] = []

    def count(graph: Any) -> None:
        graph.codegen()
        nodes = [n for n in graph.scheduler.nodes if isinstance(n, (FusedSchedulerNode, SchedulerNode))]
        graphs.append([len(nodes), sum(node.get_read_write_buffers_sizes() for node in nodes)])
        raise Counted

    def run_as_it_is(module: Any, inputs: Any, **options: Any) -> Any:
        number = len(graphs)
        try:
            compile_fx_inner(module, inputs, **options)
        except Exception:  # inductor wraps it
            if len(graphs) == number:
                raise
        return module

    def without_kernel(query: Any, key: Any, *more: Any, **options: Any) -> Any:
        return torch.zeros_like(query), query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    def without_gradient(grad: Any, *parts: Any, **options: Any) -> Any:
        return tuple(torch.zeros_like(part) for part in parts[:3])

    GraphLowering.compile_to_module = count  # type: ignore[method-assign,assignment]
    inductor.force_disable_caches = True
    inductor.force_pointwise_cat = True  # as on a GPU; on a CPU inductor copies what is concatenated
    varlen._varlen_attn.register_kernel("cpu")(without_kernel)
    varlen._varlen_attn_backward.register_kernel("cpu")(without_gradient)
    config = load_config(recipe, overrides)
    embedder = build(config, 2, 1).to_empty(device="cpu")
    for layer in (embedder.layers()[0], embedder.vision_layers()[0]):
        layer.compile(dynamic=False, backend=lambda *parts: compile_fx(*parts, inner_compile=run_as_it_is))
    with torch.no_grad():
        for tensor in (*embedder.parameters(), *embedder.buffers()):
            tensor.zero_()
    found: dict[str, list[list[float]]] = {part: [] for part in PARTS}
    for size in SIZES:
        graphs.clear()
        grids = np.array([(1, 16, size // 16)])
        patches = torch.zeros(size, 3, embedder.pixels.patch**2, dtype=torch.uint8)
        batch = Batch(torch.zeros(size, dtype=torch.int64), [size // 2] * 2)
        with torch.autocast("cpu", torch.bfloat16), under_autocast(embedder.backbone):
            with torch.no_grad():
                embedder.features(patches, grids)
                embedder(batch)
            vectors = embedder(batch)
        vectors.sum().backward()
        assert len(graphs) == len(PARTS), f"{len(graphs)} graphs: a layer is not one"
        for part, graph in zip(PARTS, graphs, strict=True):
            found[part].append(graph)
    return found


if __name__ == "__main__":
    print(json.dumps(_count(sys.argv[1], sys.argv[2:])))
