"""Qwen2.5-VL: a vision tower with window attention, and time in M-RoPE positions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from b3.model.attention import Packing, is_bucketed
from b3.model.backbones.qwen_vl import QwenVL, TowerLayout
from b3.model.backbones.tiny import make_tiny_qwen


class Qwen2_5VL(QwenVL):
    """An `Embedder` over upstream's `Qwen2_5_VLForConditionalGeneration`."""

    title = "Qwen2.5-VL"
    upstream = "Qwen2_5_VLForConditionalGeneration"

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        text: dict[str, Any] = {}
        vision = {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0]}
        return make_tiny_qwen(folder, texts, "qwen2_5_vl", text, vision, seed)

    def tower_arguments(self, grids: Tensor) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_window_index

        visual = self.core.visual
        order, edges = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
        lengths = edges.diff().numpy()
        windows = Packing.of(lengths, causal=False, equal=True, is_bucketed=is_bucketed(visual))
        whole = TowerLayout.of(grids.numpy(), is_bucketed(visual)).packing
        return {
            "window_index": order,
            "cu_window_seqlens": windows.boundaries,
            "max_window_seqlen": windows.longest,
            "packing": {len(packing.boundaries): packing for packing in (windows, whole)},
        }

    @classmethod
    def time_step(cls, config: Any) -> int:
        return int(config.vision_config.tokens_per_second)
