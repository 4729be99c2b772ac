"""The kernel for packed sequences: boundaries and options by value, with a plain loop over sequences in its place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from b3 import Embedder
from b3.model import attention
from b3.model.attention import NAMES, kernel_name, use_packed_attention, varlen_attention

CALLS: list[int] = []


def plain(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, key_edges: Tensor, longest: int, key_longest: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """(T, H, D) as torch documents its kernel: each sequence by itself, products and softmax written out."""
    assert edges is key_edges and longest == key_longest == int(edges.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    CALLS.append(len(edges) - 1)
    outputs = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if window_size == (-1, 0):
            scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), float("-inf"))
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def items(images: bool) -> list[Any]:
    texts: list[Any] = ["a red disc", "what is a very long question about blue bars?", "x", "a green frame number 7"]
    if not images:
        return texts
    shown = [Image.open(io.BytesIO(tiny.image("red", "disc", seed))) for seed in range(3)]
    return [*texts, *({"text": tiny.QUERY, "image": shot} for shot in shown)]


@pytest.mark.parametrize("kind", ["qwen2_vl", "roberta"])
def test_packed_kernel_gives_what_padded_rows_give(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, so that only rounding is left between the two: vectors, and gradients of all weights."""
    write = tiny.write_model if kind == "qwen2_vl" else tiny.write_text_model
    model = Embedder.from_pretrained(write(tmp_path / "model"), dtype="float32", device="cpu")
    model.backbone.requires_grad_(True)
    towers = [model.core.visual, model.core.language_model] if kind == "qwen2_vl" else [model.core]
    monkeypatch.setattr(varlen, "varlen_attn", plain)
    monkeypatch.setattr(attention, "_half", lambda query: query.dtype)
    batch = batch_of(model, items(images=kind == "qwen2_vl"))
    results = []
    for name in ("sdpa", "varlen"):
        use_packed_attention(name, *towers)
        CALLS.clear()
        vectors = model(batch)
        (vectors[:, 0].sum() + vectors.pow(3).sum()).backward()
        results.append((vectors.detach(), tiny.gradients(model), list(CALLS)))
    (padded, padded_gradients, unused), (packed, packed_gradients, calls) = results
    assert not unused and calls == ([3, 7, 7] if kind == "qwen2_vl" else [4, 4])  # sequences of each layer's call
    assert torch.allclose(packed, padded, atol=1e-6)
    assert padded_gradients.keys() == packed_gradients.keys()
    whole = [torch.cat([g.flatten() for g in part.values()]) for part in (packed_gradients, padded_gradients)]
    assert tiny.relative(*whole) < 1e-5


def batch_of(model: Embedder, inputs: list[Any]) -> Any:
    from b3.data.items import Item
    from b3.model.batch import collate

    made = [Item(entry) if isinstance(entry, str) else Item(entry["text"], image=entry["image"]) for entry in inputs]
    return collate([model.processor(item) for item in made])


class Layer(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_kernel_runs_in_16_bit_without_dropout_and_padded_rows_else(dtype: torch.dtype, dropout: float) -> None:
    """Shapes and types, forward and backward, by torch's own description of its kernel."""
    heads, groups, width, lengths = 6, 2, 16, [5, 1, 8]
    with FakeTensorMode():
        parts = [
            torch.empty(1, n, sum(lengths), width, dtype=dtype, requires_grad=True) for n in (heads, groups, groups)
        ]
        if dtype == torch.float32 or dropout:
            with pytest.raises(KeyError):  # falls through to the padded rows, which look for the packing
                varlen_attention(Layer(), *parts, dropout=dropout)
            return
        edges = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        mixed, _ = varlen_attention(Layer(), *parts, cu_seq_lens_q=edges, max_length_q=8, scaling=0.25)
        assert mixed.shape == (1, sum(lengths), heads, width) and mixed.dtype == dtype
        mixed.sum().backward()
        assert [part.grad.shape for part in parts] == [part.shape for part in parts]


def test_float32_weights_run_it_under_autocast_only(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 1, 1, 8)
    assert attention._half(query) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._half(query) == torch.bfloat16


def test_what_computes_attention_is_named(tmp_path: Path) -> None:
    model = Embedder.from_pretrained(tiny.write_model(tmp_path / "model"), dtype="float32", device="cpu")
    assert model.attention_kernel(autocast=False).startswith("sdpa (rows")
    tower = model.core.language_model
    tower.config._attn_implementation = NAMES["varlen"]
    assert kernel_name(tower, is_half=True) == "varlen (torch's varlen_attn, FA2)"
    assert "varlen has no float32" in model.attention_kernel(autocast=False)
    tower.config.attention_probs_dropout_prob = 0.1
    assert "varlen has no attention dropout" in kernel_name(tower, is_half=True)


@pytest.mark.parametrize(
    ("capability", "installed", "asked", "runs"),
    [((9, 0), True, "auto", "varlen+FA3"), ((9, 0), False, "auto", "varlen"), ((8, 9), True, "varlen", "varlen"),
     ((7, 5), False, "auto", "sdpa"), ((9, 0), False, "sdpa", "sdpa")],
)  # fmt: skip
def test_the_kernel_follows_card_and_installation(
    capability: tuple[int, int], installed: bool, asked: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    activated: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    found = attention.find_spec
    monkeypatch.setattr(
        attention, "find_spec", lambda n: installed or None if n == "flash_attn_interface" else found(n)
    )
    chosen = attention.choose_attention(asked, torch.device("cuda", 0))
    assert "+".join([chosen, *activated]) == runs
