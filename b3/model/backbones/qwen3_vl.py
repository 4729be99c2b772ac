"""Qwen3-VL (dense): DeepStack, interleaved M-RoPE; with prompt "qwen3_vl_embedding" also Qwen3-VL-Embedding.

Several layers of the vision tower have mergers of their own (DeepStack): what a medium's token is for the text model is
the tower's output and, beside it, one vector for each of the first decoder layers, added after that layer.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3.model.backbones.qwen_vl import QwenVL, grid_weights
from b3.model.backbones.qwen_vl_images import HALF
from b3.model.backbones.tiny import make_tiny_qwen
from b3.model.batch import Batch
from b3.model.embedder import Kept


class Qwen3VL(QwenVL):
    """An `Embedder` over upstream's `Qwen3VLForConditionalGeneration`."""

    title = "Qwen3-VL"
    upstream = "Qwen3VLForConditionalGeneration"
    pixels = HALF
    is_video_split = True

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text = {"rope_parameters": rope}
        vision = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        return make_tiny_qwen(folder, texts, "qwen3_vl", text, vision, seed)

    @classmethod
    def take_packed(cls, model: Any, attention: str) -> None:
        super().take_packed(model, attention)
        add_by_number(model.model.language_model)

    def kept(self) -> Kept:
        """With the norms of q and k, in float32: per unit of width, as the shapes of 2B and 8B tell."""
        text = self.core.language_model.config
        ratio = text.intermediate_size / text.hidden_size
        queries, keys = (
            heads * text.head_dim / text.hidden_size for heads in (text.num_attention_heads, text.num_key_value_heads)
        )
        normed = 4 * (queries + keys)
        return Kept(4.5 + 4.2 * ratio + normed, mixed=9, dora=2 + normed, dropout=4.5 + 0.5 * queries + 0.5 * ratio)

    def tower_arguments(self, grids: Tensor) -> dict[str, Any]:
        return grid_weights(self.core.visual, grids)

    def features(self, patches: Tensor, grids: np.ndarray) -> Tensor:
        """(S, (1 + n) D): the tower's output and that of its n DeepStack mergers."""
        output = self.seen(patches, grids)
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)

    def language_arguments(self, batch: Batch, features: Tensor | None) -> dict[str, Any]:
        # upstream builds no mask for an attention function of ours
        arguments = {**super().language_arguments(batch, features), "attention_mask": None}
        if features is None:
            return arguments
        stacked = features[:, self.width :].to(self.dtype).split(self.width, dim=1)
        return {**arguments, "visual_pos_masks": batch.slots, "deepstack_visual_embeds": list(stacked)}


def add_by_number(language: Any) -> None:
    """Make a loaded text model add what belongs to media at numbered tokens.

    Upstream takes a mask over all tokens, and with it the host would wait for a GPU in each of these layers.
    """
    language._deepstack_process = types.MethodType(_added, language)


def _added(self: Any, hidden_states: Tensor, slots: Tensor, embeds: Tensor) -> Tensor:
    """(1, T, D) with (S, D) added at the distinct tokens (S,)."""
    return hidden_states.index_add(1, slots, embeds.to(hidden_states.dtype)[None])
