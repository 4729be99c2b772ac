"""What the Qwen-VL backbones share.

Positions are 1-D (0..n-1 on all three rotary axes), as in every checkpoint of VLM2Vec V1, V2 and B3: their prompts hold
no vision-start token, so the reference's builder of 3-D positions never finds an image. ``positions="mrope"`` gives
temporal, height and width positions, for models trained with them.

Numerics "reference": moving a model to bfloat16 with a dtype cast, as the reference's evaluation does, also casts the
inverse frequencies of both towers (training never makes this cast). Language model: up to 0.4 % of each frequency, a
phase of about 1 rad at distance 1024 in the worst dimension. In the vision tower the product of position and frequency
is rounded as well.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from b3.model.attention import Packing, is_bucketed
from b3.model.backbones.qwen_vl_images import CLIP, MERGE, Pixels, QwenVLProcessor
from b3.model.backbones.vision_language import VisionLanguage
from b3.model.batch import Batch, upload
from b3.model.embedder import Kept, Tower, linear_weights
from b3.model.products import NARROW, product
from b3.model.settings import Settings


class QwenVL(VisionLanguage):
    """An `Embedder` over one of upstream's `Qwen...VLForConditionalGeneration`, which a subclass names."""

    setting_names: ClassVar[tuple[str, ...]] = Settings.__slots__
    prompts: ClassVar[tuple[str, ...]] = ("plain", "vlm2vec", "gme", "qwen3_vl_embedding")
    packed_towers: ClassVar[tuple[str, ...]] = ("visual", "language_model")
    pixels: ClassVar[Pixels] = CLIP
    is_video_split: ClassVar[bool] = False

    @classmethod
    def make_processor(cls, tokenizer: Any, config: Any, settings: Settings) -> QwenVLProcessor:
        return QwenVLProcessor(tokenizer, settings, cls.pixels, cls.is_video_split, cls.time_step(config))

    @classmethod
    def time_step(cls, config: Any) -> int:
        """Positions in time per two frames."""
        return 1

    @property
    def vision(self) -> nn.Module:
        tower: nn.Module = self.core.visual
        return tower

    def vision_layers(self) -> list[nn.Module]:
        return list(self.core.visual.blocks)

    def vision_cost(self) -> Tower:
        """The mergers run once for a square of patches."""
        vision = self.core.visual
        everything, merger = linear_weights(vision), linear_weights(vision.merger)
        square = vision.config.spatial_merge_size**2
        weights, trained = (a - b + b // square for a, b in zip(everything, merger, strict=True))
        kept = Kept(24, dora=14, dropout=4, outside=8)
        return Tower(weights, trained, vision.config.depth, self.vision_width(), kept)

    def vision_width(self) -> int:
        """Width of a layer of the vision tower."""
        return int(self.core.visual.config.hidden_size)

    @classmethod
    def take_packed(cls, model: Any, attention: str) -> None:
        super().take_packed(model, attention)
        patch_embed = model.model.visual.patch_embed
        patch_embed.forward = types.MethodType(_embedded_patches, patch_embed)

    def features(self, patches: Tensor, grids: np.ndarray) -> Tensor:
        """(S, F) features of the media tokens of (P, 3, n) uint8 patches."""
        output: Tensor = self.seen(patches, grids).pooler_output
        return output

    def seen(self, patches: Tensor, grids: np.ndarray) -> Any:
        """What the tower gives for patches; all that follows from the grids alone is made on the host."""
        visual = self.core.visual
        layout, more = TowerLayout.of(grids, is_bucketed(visual)), self.tower_arguments(torch.from_numpy(grids))
        patches, layout, more = upload((patches, layout, more), self.device)
        return visual(
            self.pixels.numbers(patches).to(self.dtype),
            grid_thw=torch.from_numpy(grids),  # not read: what follows from it is given
            **{
                "position_ids": layout.positions,
                "cu_seqlens": layout.packing.boundaries,
                "max_seqlen": layout.packing.longest,
                "packing": layout.packing,
                **more,
            },
        )

    def tower_arguments(self, grids: Tensor) -> dict[str, Any]:
        """What else the tower would compute from (media, 3) grids on the host; a packing replaces the usual one."""
        return {}

    def language_arguments(self, batch: Batch, features: Tensor | None) -> dict[str, Any]:
        positions = batch.layout.columns.expand(3, -1) if batch.positions is None else batch.positions
        return {**super().language_arguments(batch, features), "position_ids": positions[:, None]}

    def round_frequencies(self) -> None:
        """Round both towers' inverse frequencies; for a bfloat16 model also the vision tower's products."""
        super().round_frequencies()
        rotary = self.core.visual.rotary_pos_emb
        rotary.inv_freq.copy_(rotary.inv_freq.to(torch.bfloat16).to(rotary.inv_freq.dtype))
        if self.dtype == torch.bfloat16:
            rotary.forward = types.MethodType(_rounded_products, rotary)


@dataclass(frozen=True, slots=True)
class TowerLayout:
    """What the vision tower needs to know of its media. positions: (P, 2) int64, each patch's row and column."""

    positions: Tensor
    packing: Packing

    @classmethod
    def of(cls, grids: np.ndarray, is_bucketed: bool) -> TowerLayout:
        """Of (media, 3) grids; patches come in squares of MERGE x MERGE, and each step of a video sees only itself."""
        positions = []
        for steps, rows, columns in grids.tolist():
            places = np.indices((rows, columns)).reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
            positions += [places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)] * steps
        lengths = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
        packing = Packing.of(lengths, causal=False, equal=True, is_bucketed=is_bucketed)
        return cls(torch.from_numpy(np.concatenate(positions)), packing)


def grid_weights(visual: Any, grids: Tensor) -> dict[str, Any]:
    """Which learned positions a tower mixes for each patch, and how; for towers that resample a square of them."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    rows, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.config.spatial_merge_size,
    )
    return {"interp_indices": rows, "interp_weights": weights}


def _embedded_patches(self: Any, patches: Tensor) -> Tensor:
    """Patches (P, n) through upstream's convolution, whose windows do not overlap: as a matrix product.

    In 16 bit cuDNN takes many times as long for the convolution, on a CPU it takes seven times as long as oneDNN's
    product. For the small models whose products are MKL's it stays: vectors of one of the reference's programs on films
    (tests/eval/test_mmeb_v2.py) would move by more than 1e-5.
    """
    weight = self.proj.weight
    is_small = patches.device.type == "cpu" and len(weight) < NARROW
    if is_small or type(self.proj) is not nn.Conv3d:  # an adapter may have wrapped it
        output: Tensor = type(self).forward(self, patches)
        return output
    return product(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


@torch.no_grad()
def _rounded_products(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of position x frequency, the product and the result rounded to bfloat16. x only gives the device."""
    frequencies = self.inv_freq.to(device=x.device, dtype=torch.bfloat16)
    phases = position_ids[..., None].to(torch.bfloat16) * frequencies
    cos, sin = phases.cos() * self.attention_scaling, phases.sin() * self.attention_scaling
    return self.recomposition_frequencies(cos), self.recomposition_frequencies(sin)
