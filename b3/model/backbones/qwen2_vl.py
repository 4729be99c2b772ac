"""Qwen2-VL: the vector is the last token's final hidden state.

Positions are 1-D (0..n-1 on all three rotary axes), as in every checkpoint of VLM2Vec V1, V2 and B3: their prompts hold
no vision-start token, so the reference's builder of 3-D positions never finds an image. ``positions="mrope"`` gives
upstream's positions, for models trained with them. Items are packed end to end without padding and each pools its own
last token, so that a vector does not depend on the rest of its batch.

Numerics "reference": moving a model to bfloat16 with a dtype cast, as the reference's evaluation does, also casts the
inverse frequencies of both towers (training never makes this cast). Language model: up to 0.4 % of each frequency, a
phase of about 1 rad at distance 1024 in the worst dimension. In the vision tower the product of position and frequency
is rounded as well.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from b3.errors import InputError
from b3.model.adapter import PAPER_TARGETS
from b3.model.attention import Packing, is_bucketed, kernel_arguments, kernel_name, use_packed_attention
from b3.model.backbones.qwen2_vl_images import Qwen2VLProcessor, TowerLayout, pixels_of
from b3.model.backbones.tiny import make_tiny_model
from b3.model.batch import Batch, upload
from b3.model.checkpoint import load_transformers
from b3.model.embedder import Cost, Embedder, Kept, Tower, finish, linear_weights
from b3.model.settings import Settings


class Qwen2VL(Embedder):
    """An `Embedder` over upstream's `Qwen2VLForConditionalGeneration`.

    It keeps its language head, so that adapter key names are those other software expects, but it is never run.
    """

    title = "Qwen2-VL"
    reads_images = True
    setting_names: ClassVar[tuple[str, ...]] = Settings.__slots__
    adapter_targets: ClassVar[tuple[str, ...]] = PAPER_TARGETS

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        if settings.pooling not in ("auto", "last"):
            raise InputError(f"pooling '{settings.pooling}' is not for Qwen2-VL, whose vector is its last token's")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
        from transformers import Qwen2VLForConditionalGeneration

        model = load_transformers(Qwen2VLForConditionalGeneration, folder, dtype, device)
        use_packed_attention(attention, model.model.visual, model.model.language_model)
        patch_embed = model.model.visual.patch_embed
        patch_embed.forward = types.MethodType(_embedded_patches, patch_embed)
        backbone: nn.Module = model
        return backbone

    @classmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, settings: Settings) -> Qwen2VL:
        processor = Qwen2VLProcessor.from_pretrained(
            base,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            max_length=settings.max_length,
            square=settings.square,
        )
        source = {"base": str(base), "adapter": adapter and str(adapter)}
        model = cls(backbone, processor, replace(settings, pooling="last"), source)
        if settings.numerics == "reference":
            round_frequencies(model.core)
        return model

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        return make_tiny_model(folder, texts, hidden=32, layers=2, vision_layers=1, vocab_size=512, seed=seed)

    def describe(self) -> str:
        return f"the last token's final hidden state, L2-normalised; positions are `{self.settings.positions}`"

    @property
    def core(self) -> Any:
        """The inner model (`.visual`, `.language_model`) without the language head."""
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            backbone = backbone.get_base_model()
        return backbone.model

    @property
    def vision(self) -> nn.Module:
        tower: nn.Module = self.core.visual
        return tower

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.core.language_model.embed_tokens.weight.dtype
        return dtype

    @property
    def dim(self) -> int:
        return int(self.core.language_model.config.hidden_size)

    def attention_kernel(self, autocast: bool) -> str:
        return kernel_name(self.core.language_model, autocast or self.dtype.itemsize == 2)

    def layers(self) -> list[nn.Module]:
        return list(self.core.language_model.layers)

    def cost(self) -> Cost:
        text = self.core.language_model.config
        ratio = text.intermediate_size / text.hidden_size
        kept = Kept(5 + 4.2 * ratio, mixed=9, dora=6.8, dropout=0.76 * (4 + ratio))
        weights = linear_weights(self.core.language_model)
        language = Tower(*weights, text.num_hidden_layers, text.hidden_size, kept, causal=True)
        return Cost(language, self._vision_cost(), self.core.visual.config.spatial_merge_size**2)

    def _vision_cost(self) -> Tower:
        """Per patch: the merger runs once for a square of patches."""
        vision = self.core.visual
        everything, merger = linear_weights(vision), linear_weights(vision.merger)
        square = vision.config.spatial_merge_size**2
        weights, trained = (a - b + b // square for a, b in zip(everything, merger, strict=True))
        kept = Kept(24, dora=14, dropout=4, outside=8)
        return Tower(weights, trained, vision.config.depth, vision.config.embed_dim, kept)

    def features(self, patches: Tensor, grids: np.ndarray) -> Tensor:
        """(S, D) features of the image tokens of (P, 3, 196) uint8 patches."""
        patches, layout = upload((patches, TowerLayout.of(grids, is_bucketed(self.core.visual))), self.device)
        packing: Packing = layout.packing
        output: Tensor = self.core.visual(
            pixels_of(patches).to(self.dtype),
            grid_thw=torch.from_numpy(grids),  # not read: what follows from it is given
            position_ids=layout.positions,
            cu_seqlens=packing.boundaries,
            max_seqlen=packing.longest,
            packing=packing,
        ).pooler_output
        return output

    def layout(self, batch: Batch) -> Layout:
        packing = Packing.of(batch.lengths, is_bucketed=is_bucketed(self.core.language_model))
        if self.settings.positions == "1d":
            return Layout(packing)
        slots = torch.zeros(len(batch.input_ids), dtype=torch.bool)
        if batch.slots is not None:
            slots[batch.slots] = True
        return Layout(packing, mrope_positions(self.core, batch.input_ids, batch.lengths, slots, batch.grids))

    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        language, batch = self.core.language_model, self.placed(batch)
        packing, positions = batch.layout.packing, batch.layout.positions
        if positions is None:
            positions = packing.columns.expand(3, -1)
        embeds = language.embed_tokens(batch.input_ids)
        if features is None and batch.patches is not None:
            assert batch.grids is not None
            features = self.features(batch.patches, batch.grids)
        if features is not None:
            assert batch.slots is not None
            embeds = embeds.index_copy(0, batch.slots, features.to(embeds.dtype))
        hidden = language(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            attention_mask=dict.fromkeys(("full_attention", "sliding_attention")),  # packing takes the mask's place
            use_cache=False,
            **kernel_arguments(packing),
        ).last_hidden_state.squeeze(0)
        return finish(hidden.index_select(0, packing.boundaries[1:].long() - 1), normalize)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the language model needs to know of a batch.

    positions: (3, T) int64, upstream's temporal, height and width positions; None: 0..n-1 on all axes.
    """

    packing: Packing
    positions: Tensor | None = None


def _embedded_patches(self: Any, patches: Tensor) -> Tensor:
    """Patches (P, 1176) through upstream's convolution, whose windows do not overlap: on a GPU as a matrix product.

    In 16 bit cuDNN takes many times as long for it. On a CPU the convolution stays, to the last bit.
    """
    if patches.device.type == "cpu" or type(self.proj) is not nn.Conv3d:  # an adapter may have wrapped it
        output: Tensor = type(self).forward(self, patches)
        return output
    weight = self.proj.weight
    return linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


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


def mrope_positions(
    core: Any, input_ids: Tensor, lengths: list[int], slots: Tensor, grids: np.ndarray | None
) -> Tensor:
    """(3, T) int64 temporal, height and width positions of packed rows, by upstream's own rule.

    input_ids: (T,) packed. lengths: of the B rows. slots: (T,) bool, tokens of images. grids: (images, 3).
    """
    parts, image, start = [], 0, 0
    for length in lengths:
        span = slice(start, start + length)
        has_image = bool(slots[span].any())
        grid = None if not has_image or grids is None else torch.from_numpy(grids[image : image + 1])
        image += has_image
        positions, _ = core.get_rope_index(
            input_ids[span][None], mm_token_type_ids=slots[span][None].int(), image_grid_thw=grid
        )
        parts.append(positions[:, 0])
        start += length
    return torch.cat(parts, dim=1)
