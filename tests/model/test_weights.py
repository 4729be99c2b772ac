"""All weights come back as they were, and as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from golden_data import checkpoint

from b3 import Embedder
from b3.model.checkpoint import unfreeze_all


def test_saved_weights_are_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = Embedder.from_pretrained(checkpoint(tmp_path / "base"), dtype="float32", device="cpu")
    before = model.encode(["a cat"])
    unfreeze_all(model.backbone)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    changed = model.encode(["a cat"])
    assert np.abs(changed - before).max() > 1e-4
    model.save(tmp_path / "saved")
    assert np.array_equal(Embedder.from_pretrained(tmp_path / "saved", dtype="float32").encode(["a cat"]), changed)
    other = Embedder.from_pretrained(tmp_path / "base", dtype="float32", device="cpu")
    unfreeze_all(other.backbone)
    other.load_weights(tmp_path / "saved")
    assert np.array_equal(other.encode(["a cat"]), changed)
    trained = {n: p.requires_grad for n, p in model.backbone.named_parameters()}
    assert {n: p.requires_grad for n, p in other.backbone.named_parameters()} == trained
