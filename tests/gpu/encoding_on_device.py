"""Encoding and search on a device that is not the CPU: the CPU's vectors, the exact ranking, a transfer per batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from golden_data import GOLDEN, checkpoint
from pretend_device import NAME, move, pretend_device

from b3 import Embedder
from b3.data.items import Item
from b3.mining.search import SMALL, DeviceSearch, make_search, select
from b3.model.backbones.heads import Heads

TOLERANCE = 1e-6  # of a unit vector's numbers
WORDS = "red square number what is the shape of a blue disc".split()
TEXTS = [" ".join(WORDS[: 1 + i % 11]) + f" {i}" for i in range(20)]


def compare(model: Embedder, items: list[Any], batch_tokens: int) -> None:
    """Encode on both devices: the same vectors, and the host waits for nothing but each batch's vectors."""
    expected = model.encode(items, batch_tokens=batch_tokens)
    batches = []
    model.register_forward_hook(lambda *_: batches.append(1))
    with pretend_device() as session:
        move(model)
        session.blocking.clear()
        vectors = model.encode(items, batch_tokens=batch_tokens)
    assert np.abs(vectors - expected).max() < TOLERANCE
    assert session.num_blocking == len(batches) > 1, session.listing()


@pytest.mark.parametrize("positions", ["1d", "mrope"])
def test_texts_and_images(tmp_path: Path, positions: str) -> None:
    model = Embedder.from_pretrained(checkpoint(tmp_path), dtype="float32", device="cpu", positions=positions)
    names = ["noise.png", "tiny.png", "shapes2.png"]
    images = [Item(f"<|image_1|>\n{text}", GOLDEN / "images" / names[i % 3]) for i, text in enumerate(TEXTS[:6])]
    compare(model, [*TEXTS, *images], 64)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_encoders(tmp_path: Path, kind: str, pooling: str) -> None:
    folder = tiny.write_text_model(tmp_path, kind)
    compare(Embedder.from_pretrained(folder, dtype="float32", device="cpu", pooling=pooling), TEXTS, 64)


def test_heads(tmp_path: Path) -> None:
    model = Embedder.from_pretrained(Heads.tiny(tmp_path, TEXTS), dtype="float32", device="cpu")
    compare(model, TEXTS, 5)


@pytest.mark.parametrize("precision", ["highest", "high"])  # the second is TF32, with which NVIDIA's containers start
def test_search_is_exact(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(SMALL + 500, 16)).astype(np.float32)
    targets[1000:1100] = targets[:100]  # ties, decided by number
    targets = np.round(targets / np.linalg.norm(targets, axis=1, keepdims=True) * 2**12).astype(np.float32) / 2**12
    queries = targets[rng.permutation(len(targets))[:50]]
    expected_ids, expected_scores = select(queries.astype(np.float64) @ targets.astype(np.float64).T, 20)
    topk = torch.topk
    seen = []
    monkeypatch.setattr(
        torch, "topk", lambda *a, **k: seen.append(torch.backends.cuda.matmul.allow_tf32) or topk(*a, **k)
    )
    torch.set_float32_matmul_precision(precision)
    try:
        with pretend_device() as session:
            search, _ = make_search(targets, 20, device=NAME)
            assert isinstance(search, DeviceSearch)
            ids, scores = search(queries)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [False]
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert session.num_blocking <= 4, session.listing()  # both tables there, scores and ids back
