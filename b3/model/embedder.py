r"""The embedding model: a backbone, pooling, L2 normalisation. Here Qwen2-VL and its last token.

    from b3 import Embedder
    model = Embedder.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", adapter="runs/b3")
    vectors = model.encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": "cat.png"}, "a cat"])

Positions are 1-D (0..n-1 on all three rotary axes), as in every checkpoint of VLM2Vec V1, V2 and B3: their prompts hold
no vision-start token, so the reference's builder of 3-D positions never finds an image. ``positions="mrope"`` gives
upstream's positions, for models trained with them. Items are packed end to end without padding and each pools its own
last token, so that a vector does not depend on the rest of its batch. Text encoders have a file of their own beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize

from b3.data.items import Item
from b3.errors import InputError
from b3.model import adapter as adapters
from b3.model import attention as attention_kernels
from b3.model.attention import Packing
from b3.model.backbones.qwen2_vl_images import MAX_PIXELS, MIN_PIXELS, Qwen2VLProcessor
from b3.model.backbones.rotary import mrope_positions, round_frequencies
from b3.model.batch import Batch, Processor
from b3.model.checkpoint import (
    HEADS,
    TEXT_ENCODERS,
    choose_attention,
    choose_device,
    choose_dtype,
    fetch,
    load_backbone,
    model_type,
    read_json,
)


@dataclass(frozen=True, slots=True)
class Options:
    """What `Embedder.from_pretrained` was asked for, beside where the weights are and how they run."""

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    max_length: int | None = None
    positions: str = "1d"
    numerics: str = "clean"
    square: int | None = None
    pooling: str = "auto"

    def __post_init__(self) -> None:
        for value, known in (
            (self.positions, ("1d", "mrope")),
            (self.numerics, ("clean", "reference")),
            (self.pooling, ("auto", "last", "mean", "cls")),
        ):
            if value not in known:
                raise InputError(f"'{value}' is not known; use one of {', '.join(known)}")


class Embedder(nn.Module):
    """Turns items into vectors. Build one with `from_pretrained`; `forward` is differentiable, `encode` is not.

    Args:
        backbone: upstream's Qwen2-VL model, bare or wrapped by peft.
        processor: how items become inputs; must belong to the backbone.
        source: description of where the weights came from, for manifests and model cards.
    """

    causal: ClassVar[bool] = True  # whether a token sees only those before it
    adapter_targets: ClassVar[tuple[str, ...]] = adapters.PAPER_TARGETS  # none: takes no adapter
    pooling = "last"

    def __init__(
        self,
        backbone: nn.Module,
        processor: Processor,
        source: dict[str, Any] | None = None,
        positions: str = "1d",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.positions = positions
        self.source = source or {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        adapter: str | Path | None = None,
        dtype: str = "bfloat16",
        device: str | torch.device | None = None,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        attention: str = "auto",
        max_length: int | None = None,
        positions: str = "1d",
        numerics: str = "clean",
        square: int | None = None,
        pooling: str = "auto",
    ) -> Embedder:
        """Load a checkpoint, merging the adapter (if any) into its weights in float32.

        Args:
            name: hub name or folder of a full model, or of an adapter repository (its base is then loaded too).
            adapter: folder or hub name of a LoRA/DoRA adapter to merge on top of `name`.
            dtype: "float32", "bfloat16", or "auto" (bfloat16 on a GPU).
            device: None means the GPU of the local rank if there is one, else the CPU.
            min_pixels, max_pixels: image budget in pixels.
            attention: "auto", "flash_attention_2" or "sdpa".
            max_length: cut text-only items to this many tokens.
            positions: "1d" or "mrope".
            square: resize every picture to this many pixels a side first.
            numerics: "clean", or "reference" to round rotary frequencies as the reference's evaluation does.
            pooling: "last" (Qwen2-VL), "mean" or "cls" (text encoders); "auto": the checkpoint's own.

        Raises:
            InputError: the checkpoint or the adapter is missing, incomplete or of another architecture, or an option
                has no meaning for it.
        """
        options = Options(min_pixels, max_pixels, max_length, positions, numerics, square, pooling)
        base, adapter_folder = locate(name, adapter)
        kind = embedder_class(base)
        kind.check_options(options)
        if adapter_folder is not None and not kind.adapter_targets:
            raise InputError(f"the model in {base} takes no adapter ({adapter_folder}); leave it out")
        target = choose_device(device)
        torch_dtype = choose_dtype(dtype, target)
        backbone = load_backbone(base, torch_dtype, target, choose_attention(attention, target, torch_dtype))
        if adapter_folder is not None:
            adapters.merge_adapter(backbone, adapter_folder)
        return kind.build(backbone, base, adapter_folder, options)

    @classmethod
    def check_options(cls, options: Options) -> None:
        """Raise `InputError` for an option that this kind of model does not have."""
        if options.pooling not in ("auto", "last"):
            raise InputError(f"pooling '{options.pooling}' is not for Qwen2-VL, whose vector is its last token's")

    @classmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, options: Options) -> Embedder:
        """The model around a loaded backbone, with what else its folders hold."""
        processor = Qwen2VLProcessor.from_pretrained(
            base,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            max_length=options.max_length,
            square=options.square,
        )
        source = {"base": str(base), "adapter": adapter and str(adapter)}
        model = cls(backbone, processor, source, options.positions)
        if options.numerics == "reference":
            round_frequencies(model.core)
        return model

    def save_settings(self, folder: Path) -> None:
        """Write what `from_pretrained` reads beside the weights: tokenizer and image budget."""
        self.processor.save_pretrained(folder)

    def describe(self) -> str:
        """How a vector is made, in words."""
        return f"the last token's final hidden state, L2-normalised; positions are `{self.positions}`"

    @property
    def core(self) -> Any:
        """The inner model (`.visual`, `.language_model`) without the language head."""
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            backbone = backbone.get_base_model()
        return backbone.model

    @property
    def language(self) -> Any:
        """The part of `core` that reads texts."""
        return self.core.language_model

    @property
    def vision(self) -> Any | None:
        """The part of `core` that reads pictures; None if it reads none."""
        return self.core.visual

    @property
    def has_dropout(self) -> bool:
        """Whether training drops activations at random, in the backbone or the adapter."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.language.get_input_embeddings().weight.dtype

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.language.config.hidden_size)

    def picture_features(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """What the language model sees of pictures: (S, D), the features of their image tokens, in order.

        Args:
            pixels: (P, 1176) patches of all pictures.
            grids: (pictures, 3) int64, as in `Batch`.
        """
        return self.core.visual(pixels.to(self.dtype), grid_thw=grids).pooler_output

    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        """Vectors (B, D) float32 of a batch: final hidden state of each item's last token, L2-normalised if asked.

        `features` (S, D), if given, stand for the pictures in place of `batch.pixels`.
        """
        core = self.core
        embeds = core.language_model.embed_tokens(batch.input_ids)
        if features is None and batch.pixels is not None:
            assert batch.grids is not None
            features = self.picture_features(batch.pixels, batch.grids)
        if features is not None:
            assert batch.slots is not None
            embeds = embeds.index_copy(0, batch.slots, features.to(embeds.dtype))
        packing = Packing.of(batch.lengths, embeds.device, self.causal)
        hidden = core.language_model(
            inputs_embeds=embeds[None],
            position_ids=self._positions(batch, packing)[:, None],
            attention_mask=dict.fromkeys(("full_attention", "sliding_attention")),  # packing takes the mask's place
            use_cache=False,
            **self._boundaries(packing),
        ).last_hidden_state[0]
        return self._finish(hidden[packing.boundaries[1:].long() - 1], normalize)

    @staticmethod
    def _finish(pooled: Tensor, normalize: bool) -> Tensor:
        pooled = pooled if pooled.dtype == torch.float64 else pooled.float()
        return l2_normalize(pooled, dim=-1) if normalize else pooled

    def _positions(self, batch: Batch, packing: Packing) -> Tensor:
        """(3, T) int64 rotary positions: 0..n-1 on all axes, or upstream's temporal, height and width positions."""
        if self.positions == "1d":
            return packing.columns.expand(3, -1)
        slots = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
        if batch.slots is not None:
            slots[batch.slots] = True
        return mrope_positions(self.core, batch.input_ids, batch.lengths, slots, batch.grids)

    def _boundaries(self, packing: Packing) -> dict[str, Any]:
        """What tells the attention kernel where items begin and end."""
        if self.language.config._attn_implementation == attention_kernels.NAME:
            return {"packing": packing}
        edges = packing.boundaries
        return {
            "cu_seq_lens_q": edges,
            "cu_seq_lens_k": edges,
            "max_length_q": packing.longest,
            "max_length_k": packing.longest,
        }

    def encode(
        self,
        items: Sequence[Item | dict[str, Any] | str],
        normalize: bool = True,
        batch_tokens: int | None = None,
        max_items: int | None = None,
        workers: int = 0,
        progress: str | None = None,
    ) -> np.ndarray:
        """Vectors (N, D) float32 in the order of `items`; see `b3.model.encode.encode_items`."""
        from b3.model.encode import encode_items

        return encode_items(self, items, normalize, batch_tokens, max_items, workers, progress)


def locate(name: str | Path, adapter: str | Path | None = None) -> tuple[Path, Path | None]:
    """(folder of the base model, folder of the adapter or None); an adapter repository alone names its base."""
    folder = fetch(name)
    if adapter is not None:
        return folder, fetch(adapter)
    if adapters.is_adapter(folder):
        return fetch(read_json(folder / adapters.CONFIG_FILE)["base_model_name_or_path"]), folder
    return folder, None


def embedder_class(base: Path) -> type[Embedder]:
    """The kind of `Embedder` for the checkpoint in `base`, by its model_type."""
    kind = model_type(base)
    if kind in TEXT_ENCODERS:
        from b3.model.backbones.text_encoder import TextEmbedder

        return TextEmbedder
    if kind == HEADS:
        from b3.model.backbones.heads import HeadsEmbedder

        return HeadsEmbedder
    return Embedder


def reads_pictures(name: str | Path) -> bool:
    """Whether a checkpoint, or the base of an adapter repository, is of a model with a vision tower."""
    return model_type(locate(name)[0]) not in (*TEXT_ENCODERS, HEADS)
