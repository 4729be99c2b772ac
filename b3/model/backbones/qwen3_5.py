"""Qwen3.5: layers of linear attention (gated delta rule) between those of full attention; vision as in Qwen3-VL.

A layer of linear attention reads a sequence through a short convolution and a state that it carries from token to
token. Packed end to end, items would reach each other through both. Here each such layer runs upstream's own forward
pass on rows of similarly long items, padded on the right: a row's convolution and state begin anew, and what follows
an item's last token cannot reach it.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from b3.model.attention import Packing, packed, spread
from b3.model.backbones.qwen_vl import QwenVL, grid_weights
from b3.model.backbones.qwen_vl_images import HALF
from b3.model.backbones.tiny import make_tiny_qwen
from b3.model.backbones.vision_language import LANGUAGE_TARGETS
from b3.model.batch import Batch
from b3.model.embedder import Cost, Kept

# The counterparts of q, k, v (with the gate, which q_proj computes as well) and o.
LINEAR_TARGETS = r".*language_model\.layers\.\d+\.linear_attn\.(in_proj_(qkv|z)|out_proj)"


class Qwen3_5(QwenVL):
    """An `Embedder` over upstream's `Qwen3_5ForConditionalGeneration`."""

    title = "Qwen3.5"
    upstream = "Qwen3_5ForConditionalGeneration"
    pixels = HALF
    is_video_split = True
    adapter_targets: ClassVar[tuple[str, ...] | str] = rf"{LANGUAGE_TARGETS}|{LINEAR_TARGETS}"

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text = {
            "rope_parameters": {**rope, "partial_rotary_factor": 0.25},
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
        return make_tiny_qwen(folder, texts, "qwen3_5", text, {"patch_size": 16, "num_position_embeddings": 64}, seed)

    @classmethod
    def take_packed(cls, model: Any, attention: str) -> None:
        super().take_packed(model, attention)
        keep_items_apart(model.model.language_model)

    def layout(self, batch: Batch) -> Packing:
        return Packing.of(batch.lengths)  # linear attention reads buckets, whatever full attention reads

    def cost(self) -> Cost:
        """Without the delta rule's own products, which are about 1 % of a layer's operations."""
        cost, text = super().cost(), self.core.language_model.config
        attention = text.layer_types.count("full_attention") * text.num_attention_heads * text.head_dim
        return replace(cost, text=replace(cost.text, full_attention=attention))

    def kept(self) -> Kept:
        text = self.core.language_model.config
        return kept_numbers(text, text.layer_types.count("full_attention") / text.num_hidden_layers)

    def tower_arguments(self, grids: Tensor) -> dict[str, Any]:
        return grid_weights(self.core.visual, grids)

    def language_arguments(self, batch: Batch, features: Tensor | None) -> dict[str, Any]:
        masks = dict.fromkeys(("full_attention", "linear_attention"))
        return {**super().language_arguments(batch, features), "attention_mask": masks}


def keep_items_apart(language: Any) -> None:
    """Make the layers of linear attention of a loaded text model take packed sequences."""
    for layer in language.layers:
        if layer.block_type == "linear_attention":
            layer.linear_attn.forward = types.MethodType(_item_by_item, layer.linear_attn)


def kept_numbers(text: Any, share: float) -> Kept:
    """Of the mean layer, where `share` of the layers has full attention.

    Linear attention is upstream's torch code, mostly in float32, for sequences that fill its pieces of 64 tokens;
    flash-linear-attention keeps less. Of an adapter on the default targets.
    """
    unit = text.hidden_size
    ratio, queries = text.intermediate_size / unit, text.num_attention_heads * text.head_dim / unit
    keys = text.linear_num_key_heads * text.linear_key_head_dim / unit
    values = text.linear_num_value_heads * text.linear_value_head_dim / unit

    def mean(full: float, linear: float) -> float:
        return share * full + (1 - share) * linear

    return Kept(
        mean(5 + 8 * queries, 6 + 4 * keys + 45.5 * values) + 4 * ratio,
        mixed=11,
        dora=mean(4 + 5 * queries, 4 + 4 * keys + 4 * values),
        dropout=mean(3.5 + 0.5 * queries, 2 + 0.5 * values) + 0.5 * ratio,
    )


def _item_by_item(self: Any, hidden_states: Tensor, *, packing: Packing, **options: Any) -> Tensor:
    """(1, T, D) packed in and out, by upstream's forward pass on each bucket's (count, longest, D)."""
    tables = [type(self).forward(self, spread(hidden_states[:, None], bucket).squeeze(1)) for bucket in packing.buckets]
    return packed(tables, packing.buckets)
