r"""The embedding model: a Qwen2-VL backbone, last-token pooling, L2 normalisation.

    from b3 import Embedder
    model = Embedder.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", adapter="runs/b3")
    vectors = model.encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": "cat.png"}, "a cat"])

Positions are 1-D (0..n-1 on all three rotary axes), as in every checkpoint of VLM2Vec V1, V2 and B3: their prompts hold
no vision-start token, so the reference's builder of 3-D positions never finds an image. ``positions="mrope"`` gives
upstream's positions, for models trained with them. Items are packed end to end without padding and each pools its own
last token, so that a vector does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize

from b3.data.records import Item
from b3.errors import InputError
from b3.model import adapter as adapters
from b3.model import attention as attention_kernels
from b3.model.attention import Packing
from b3.model.backbones import HEADS, choose_attention, choose_device, choose_dtype, fetch, load_backbone, read_json
from b3.model.processing import MAX_PIXELS, MIN_PIXELS, Processed, Processor
from b3.model.rotary import mrope_positions, round_frequencies


@dataclass(frozen=True, slots=True)
class Batch:
    """Processed items, packed end to end without padding.

    input_ids: (T,) int64. lengths: tokens of each of the B items, T in all.
    pixels: (P, 1176) float32 patches of all pictures in item order, or None. grids: (pictures, 3) int64 (1, rows,
    columns). slots: (S,) int64, positions of the tokens that stand for the pictures' features, in the same order.
    """

    input_ids: Tensor
    lengths: list[int]
    pixels: Tensor | None = None
    grids: Tensor | None = None
    slots: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        pixels, grids, slots = (None if t is None else change(t) for t in (self.pixels, self.grids, self.slots))
        return Batch(change(self.input_ids), self.lengths, pixels, grids, slots)


def collate(items: Sequence[Processed], image_token_id: int) -> Batch:
    """Pack processed items into one `Batch`.

    A placeholder in an item without picture is no slot: it keeps its literal token embedding (stray tokens of WebQA and
    EDIS queries).
    """
    lengths = [item.num_tokens for item in items]
    input_ids = torch.from_numpy(np.concatenate([item.input_ids for item in items]))
    pixels, grids, slots, start = [], [], [], 0
    for item, length in zip(items, lengths, strict=True):
        if item.pixels is not None and item.grid is not None:
            pixels.append(item.pixels)
            grids.append((1, *item.grid))
            slots.append(start + np.flatnonzero(item.input_ids == image_token_id))
        start += length
    if not pixels:
        return Batch(input_ids, lengths)
    return Batch(
        input_ids,
        lengths,
        torch.from_numpy(np.concatenate(pixels)),
        torch.tensor(grids, dtype=torch.int64),
        torch.from_numpy(np.concatenate(slots)),
    )


class Embedder(nn.Module):
    """Turns items into vectors. Build one with `from_pretrained`; `forward` is differentiable, `encode` is not.

    Args:
        backbone: upstream's Qwen2-VL model, bare or wrapped by peft.
        processor: how items become inputs; must belong to the backbone.
        source: description of where the weights came from, for manifests and model cards.
    """

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

        Raises:
            InputError: the checkpoint or the adapter is missing, incomplete or of another architecture.
        """
        for value, known in ((positions, ("1d", "mrope")), (numerics, ("clean", "reference"))):
            if value not in known:
                raise InputError(f"'{value}' is not known; use one of {', '.join(known)}")
        folder = fetch(name)
        base, adapter_folder = folder, None if adapter is None else fetch(adapter)
        if adapter_folder is None and adapters.is_adapter(folder):
            base, adapter_folder = fetch(read_json(folder / adapters.CONFIG_FILE)["base_model_name_or_path"]), folder
        target = choose_device(device)
        if read_json(base / "config.json").get("model_type") == HEADS:
            from b3.model.heads import HeadsEmbedder

            if adapter_folder is not None:
                raise InputError(f"{base} holds heads over frozen vectors, which take no adapter ({adapter_folder})")
            return HeadsEmbedder.load(base, target)
        torch_dtype = choose_dtype(dtype, target)
        backbone = load_backbone(base, torch_dtype, target, choose_attention(attention, target, torch_dtype))
        if adapter_folder is not None:
            adapters.merge_adapter(backbone, adapter_folder)
        processor = Processor.from_pretrained(
            base, min_pixels=min_pixels, max_pixels=max_pixels, max_length=max_length, square=square
        )
        model = cls(
            backbone, processor, {"base": str(base), "adapter": adapter_folder and str(adapter_folder)}, positions
        )
        if numerics == "reference":
            round_frequencies(model.core)
        return model

    @property
    def core(self) -> Any:
        """The inner model (`.visual`, `.language_model`) without the language head."""
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            backbone = backbone.get_base_model()
        return backbone.model

    @property
    def vision(self) -> nn.Module | None:
        """The vision tower, if there is one."""
        return getattr(self.core, "visual", None)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.core.language_model.embed_tokens.weight.dtype

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.core.language_model.config.hidden_size)

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
        packing = Packing.of(batch.lengths, embeds.device)
        hidden = core.language_model(
            inputs_embeds=embeds[None],
            position_ids=self._positions(batch, packing)[:, None],
            attention_mask=dict.fromkeys(("full_attention", "sliding_attention")),  # packing takes the mask's place
            use_cache=False,
            **self._boundaries(packing),
        ).last_hidden_state[0]
        pooled = hidden[packing.boundaries[1:].long() - 1]
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
        if self.core.language_model.config._attn_implementation == attention_kernels.NAME:
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
        """Vectors (N, D) float32 in the order of `items`; see `b3.encode.encode_items`."""
        from b3.encode import encode_items

        return encode_items(self, items, normalize, batch_tokens, max_items, workers, progress)
