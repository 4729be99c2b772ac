"""What a compiled layer is on a GPU, without one: a single graph around packed attention, and what is fused in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny import gradients
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from b3 import Embedder
from b3.data.items import as_item
from b3.model.adapter import AdapterSpec, attach_adapter, under_autocast
from b3.model.backbones.tiny import make_tiny_model
from b3.model.batch import collate
from benchmarks.shapes.fused import SIZES, compiled, fused_layers

TEXTS = ["a red apple", "a quick brown fox jumps", "x"]
RECIPE = "configs/b3_qwen2vl_2b.yaml"
WIDTH, INNER, KEYS = 1536, 8960, 256  # of a text layer of Qwen2-VL-2B


def scores_of(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """Weights of attention (H, L, L) of one sequence, float32."""
    scores = query @ key.transpose(1, 2) * scale
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool() & causal, float("-inf")).softmax(dim=-1)


def sequences(edges: Tensor, query: Tensor, *parts: Tensor) -> list[tuple[slice, list[Tensor]]]:
    """Each sequence's place and its (H, L, D) parts in float32, keys repeated for grouped heads."""
    found = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        own = [part[start:end].transpose(0, 1).float() for part in (query, *parts)]
        found.append((slice(start, end), [p.repeat_interleave(query.shape[1] // len(p), dim=0) for p in own]))
    return found


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float = 1.0, window_size: Sequence[int] = (), *more: Any, **options: Any,
) -> Any:  # fmt: skip
    output = torch.zeros_like(query)
    for place, (q, k, v) in sequences(cu_seq_q, query, key, value):
        weights = scores_of(q, k, scale, list(window_size) == [-1, 0])
        output[place] = (weights @ v).transpose(0, 1).to(output.dtype)
    return output, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_seq_q: Tensor,
    cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng_state: Tensor, scale: float = 1.0,
    window_size: Sequence[int] = (),
) -> Any:  # fmt: skip
    grads = [torch.zeros_like(part) for part in (query, key, value)]
    for place, (q, k, v, g) in sequences(cu_seq_q, query, key, value, grad):
        weights = scores_of(q, k, scale, list(window_size) == [-1, 0])
        inner = g @ v.transpose(1, 2)
        by_scores = weights * (inner - (inner * weights).sum(dim=-1, keepdim=True)) * scale
        own = (by_scores @ k, by_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g)
        for target, part in zip(grads, own, strict=True):
            heads = part.unflatten(0, (target.shape[1], -1)).sum(dim=1)
            target[place] = heads.transpose(0, 1).to(target.dtype)
    return tuple(grads)


@pytest.fixture(scope="module")
def on_cpu() -> None:
    """The operator has no CPU kernel of its own; registered ones stay, and nothing else here asks for it."""
    operators: Any = varlen
    operators._varlen_attn.register_kernel("cpu")(forward)
    operators._varlen_attn_backward.register_kernel("cpu")(backward)


def model_of(folder: Path, attention: str) -> Embedder:
    model = Embedder.from_pretrained(folder, dtype="bfloat16", device="cpu")
    core: Any = model.backbone
    type(model).take_packed(core, attention)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model.backbone = attach_adapter(model.backbone, AdapterSpec(dropout=0.0))
    return model.train()


def step(model: Embedder, pictures: list[tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Both passes of a step on texts and grey images of these sizes: vectors and gradients."""
    from PIL import Image

    shown = [{"text": "<|image_1|>a fox", "image": Image.new("RGB", size, "gray")} for size in pictures]
    batch = collate([model.processor(as_item(item)) for item in [*TEXTS, *shown]])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), under_autocast(model.backbone):
        with torch.no_grad():
            model(batch)
        vectors = model(batch)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return vectors.detach(), gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 4])
def test_a_layer_is_one_graph_whatever_is_packed(layers: int, tmp_path: Path, on_cpu: None) -> None:
    """A text layer, the last one and a block of the tower, with and without a gradient, for the first two sizes."""
    make_tiny_model(tmp_path, TEXTS * 5, hidden=64, layers=layers, vision_layers=layers)
    plain, model = model_of(tmp_path, "varlen"), model_of(tmp_path, "varlen")
    torch._dynamo.reset()
    counters.clear()
    for layer in model.compiled_layers():
        layer.compile(dynamic=True, backend="eager")
    for pictures in ([(112, 84)], [(56, 84), (84, 84)], [(112, 112)] * 3):
        ours, exact = step(model, pictures), step(plain, pictures)
        torch.testing.assert_close(ours[0], exact[0], rtol=0, atol=0)
        for name, gradient in exact[1].items():
            torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=0)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 10, dict(counters["stats"])


@pytest.fixture(scope="module")
def found() -> dict[str, list[list[float]]]:
    return fused_layers(RECIPE, ["adapter.dropout=0", "adapter.use_dora=false"])


@pytest.mark.slow
def test_fused_bytes_are_those_that_a_layer_has_to_move(found: dict[str, list[list[float]]]) -> None:
    """Counted by hand for a pass with LoRA: no kernel moves less, and inductor's little more.

    Normalised input (read, write) twice; queries and keys, and values, with what the adapter adds (two reads, a write),
    and turned (read, write); o_proj and down_proj with theirs and the residual (three reads, a write); the gate (two
    reads, a write).
    """
    (_, least), (_, most) = found["pass 1"]
    a_token = (most - least) / (SIZES[1] - SIZES[0])
    numbers = 4 * WIDTH + 3 * (WIDTH + 2 * KEYS) + 8 * WIDTH + 3 * INNER
    assert 0.9 < a_token / (2 * numbers) < 1.4
    assert found["pass 2"][0][1] >= least  # what is kept for backward is written


def test_compiled_layers_take_the_place_of_their_element_wise_kernels() -> None:
    """Of 2 text layers and 1 block, 3 and 1, 2 and 2, in made-up numbers, continued to 5 and 4."""

    def told(layers: int, blocks: int) -> dict[str, Any]:
        products = {"gemm": [layers, 10.0 * layers, 0.0]}
        return {
            "parts": {
                "vision, pass 1": {
                    "gemm": [blocks, 7.0 * blocks, 0.0],
                    "add": [3 * blocks + 1, 0.0, 30.0 * blocks + 5],
                },
                "pass 1": {**products, "mul": [6 * layers + 2, 0.0, 60.0 * layers + 4]},
            },
            "image_tokens": 64,
        }

    results = [told(2, 1), told(3, 1), told(2, 2)]
    found = {"vision, pass 1": [[2, 256.0], [2, 512.0]], "pass 1": [[4, 2560.0], [4, 5120.0]]}
    parts = compiled(results, 5, 4, found, 1024)["parts"]
    assert parts["vision, pass 1"] == {"gemm": [4, 28.0, 0.0], "add": [1, 0.0, 5.0], "fused": [8, 0.0, 4 * 256.0]}
    assert parts["pass 1"] == {"gemm": [5, 50.0, 0.0], "mul": [8, 0.0, 64.0], "fused": [16, 0.0, 4 * 10240.0]}
