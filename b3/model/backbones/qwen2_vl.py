"""Qwen2-VL, the backbone of the paper and of VLM2Vec; with prompt "gme" also GME-Qwen2-VL."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from b3.model.adapter import PAPER_TARGETS
from b3.model.backbones.qwen_vl import QwenVL
from b3.model.backbones.tiny import make_tiny_model


class Qwen2VL(QwenVL):
    """An `Embedder` over upstream's `Qwen2VLForConditionalGeneration`."""

    title = "Qwen2-VL"
    upstream = "Qwen2VLForConditionalGeneration"
    adapter_targets: ClassVar[tuple[str, ...]] = PAPER_TARGETS  # no layer of its vision tower has these names

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        return make_tiny_model(folder, texts, hidden=32, layers=2, vision_layers=1, vocab_size=512, seed=seed)

    def vision_width(self) -> int:
        return int(self.core.visual.config.embed_dim)
