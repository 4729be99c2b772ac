"""The reference's rounding of rotary frequencies, and M-RoPE positions for models trained elsewhere.

Moving a model to bfloat16 with a dtype cast, as the reference's evaluation does, also casts the inverse frequencies of
both towers (training never makes this cast). Language model: up to 0.4 % of each frequency, a phase of about 1 rad at
distance 1024 in the worst dimension. In the vision tower the product of position and frequency is rounded as well.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def round_frequencies(core: Any) -> None:
    """Round both towers' inverse frequencies to bfloat16; for a bfloat16 model also the vision tower's products."""
    for rotary in (core.language_model.rotary_emb, core.visual.rotary_pos_emb):
        rotary.inv_freq.copy_(rotary.inv_freq.to(torch.bfloat16).to(rotary.inv_freq.dtype))
    if core.language_model.embed_tokens.weight.dtype == torch.bfloat16:
        core.visual.rotary_pos_emb.forward = types.MethodType(_rounded_products, core.visual.rotary_pos_emb)


@torch.no_grad()
def _rounded_products(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of position x frequency, the product and the result rounded to bfloat16. x only gives the device."""
    frequencies = self.inv_freq.to(device=x.device, dtype=torch.bfloat16)
    phases = position_ids[..., None].to(torch.bfloat16) * frequencies
    cos, sin = phases.cos() * self.attention_scaling, phases.sin() * self.attention_scaling
    return self.recomposition_frequencies(cos), self.recomposition_frequencies(sin)


def mrope_positions(core: Any, input_ids: Tensor, lengths: list[int], slots: Tensor, grids: Tensor | None) -> Tensor:
    """(3, T) int64 temporal, height and width positions of packed rows, by upstream's own rule.

    input_ids: (T,) packed. lengths: of the B rows. slots: (T,) bool, tokens of pictures. grids: (pictures, 3).
    """
    parts, picture, start = [], 0, 0
    for length in lengths:
        span = slice(start, start + length)
        has_picture = bool(slots[span].any())
        grid = None if not has_picture or grids is None else grids[picture : picture + 1]
        picture += has_picture
        positions, _ = core.get_rope_index(
            input_ids[span][None], mm_token_type_ids=slots[span][None].int(), image_grid_thw=grid
        )
        parts.append(positions[:, 0])
        start += length
    return torch.cat(parts, dim=1)
