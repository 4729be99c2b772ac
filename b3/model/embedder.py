r"""The embedding model: a Qwen2-VL backbone, last-token pooling, L2 normalisation.

    from b3 import Embedder
    model = Embedder.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", adapter="runs/b3")
    vectors = model.encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": "cat.png"}, "a cat"])

Positions are 1-D (0..n-1 on all three rotary axes), as in every checkpoint of VLM2Vec V1, V2 and B3: their prompts hold
no vision-start token, so the reference's builder of 3-D positions never finds an image. Rows are padded on the right,
where causal attention needs no mask, and each row pools its own last token, so that a row's vector does not depend on
the rest of its batch.
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
from b3.model import adapter as adapters
from b3.model.backbones import choose_attention, choose_device, choose_dtype, fetch, load_backbone, read_json
from b3.model.processing import MAX_PIXELS, MIN_PIXELS, Processed, Processor


@dataclass(frozen=True, slots=True)
class Batch:
    """Processed items, padded on the right.

    input_ids: (B, L) int64. lengths: (B,) int64, tokens of each row. pixels: (P, 1176) float32 patches of all pictures
    in row order, or None. grids: (pictures, 3) int64 (1, rows, columns). image_rows: (pictures,) int64.
    """

    input_ids: Tensor
    lengths: Tensor
    pixels: Tensor | None = None
    grids: Tensor | None = None
    image_rows: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        pixels, grids, rows = (None if t is None else change(t) for t in (self.pixels, self.grids, self.image_rows))
        return Batch(change(self.input_ids), change(self.lengths), pixels, grids, rows)


def collate(items: Sequence[Processed]) -> Batch:
    """Stack processed items into one `Batch`. Pads carry token 0, which nothing reads."""
    lengths = torch.tensor([item.num_tokens for item in items], dtype=torch.int64)
    input_ids = torch.zeros((len(items), int(lengths.max())), dtype=torch.int64)
    for row, item in enumerate(items):
        input_ids[row, : item.num_tokens] = torch.from_numpy(item.input_ids)
    pictures = [(row, i.pixels, i.grid) for row, i in enumerate(items) if i.pixels is not None and i.grid is not None]
    if not pictures:
        return Batch(input_ids, lengths)
    pixels = torch.from_numpy(np.concatenate([patches for _, patches, _ in pictures]))
    grids = torch.tensor([(1, *grid) for _, _, grid in pictures], dtype=torch.int64)
    return Batch(input_ids, lengths, pixels, grids, torch.tensor([row for row, _, _ in pictures], dtype=torch.int64))


class Embedder(nn.Module):
    """Turns items into vectors. Build one with `from_pretrained`; `forward` is differentiable, `encode` is not.

    Args:
        backbone: upstream's Qwen2-VL model, bare or wrapped by peft.
        processor: how items become inputs; must belong to the backbone.
        source: description of where the weights came from, for manifests and model cards.
    """

    def __init__(self, backbone: nn.Module, processor: Processor, source: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.processor = processor
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
    ) -> Embedder:
        """Load a checkpoint, merging the adapter (if any) into its weights in float32.

        Args:
            name: hub name or folder of a full model, or of an adapter repository (its base is then loaded too).
            adapter: folder or hub name of a LoRA/DoRA adapter to merge on top of `name`.
            dtype: "float32", "bfloat16", or "auto" (bfloat16 on a GPU).
            device: None means the GPU of the local rank if there is one, else the CPU.
            min_pixels, max_pixels: image budget in pixels.
            attention: "auto", "flash_attention_2", "sdpa" or "eager".
            max_length: cut text-only items to this many tokens.

        Raises:
            InputError: the checkpoint or the adapter is missing, incomplete or of another architecture.
        """
        folder = fetch(name)
        base, adapter_folder = folder, None if adapter is None else fetch(adapter)
        if adapter_folder is None and adapters.is_adapter(folder):
            base, adapter_folder = fetch(read_json(folder / adapters.CONFIG_FILE)["base_model_name_or_path"]), folder
        target = choose_device(device)
        torch_dtype = choose_dtype(dtype, target)
        backbone = load_backbone(base, torch_dtype, target, choose_attention(attention, target, torch_dtype))
        if adapter_folder is not None:
            adapters.merge_adapter(backbone, adapter_folder)
        processor = Processor.from_pretrained(base, min_pixels=min_pixels, max_pixels=max_pixels, max_length=max_length)
        return cls(backbone, processor, {"base": str(base), "adapter": adapter_folder and str(adapter_folder)})

    @property
    def core(self) -> Any:
        """The inner model (`.visual`, `.language_model`) without the language head."""
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            backbone = backbone.get_base_model()
        return backbone.model

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

    def forward(self, batch: Batch, normalize: bool = True) -> Tensor:
        """Vectors (B, D) float32 of a batch: final hidden state of each row's last token, L2-normalised if asked.

        A placeholder in a row without picture keeps its literal token embedding (stray tokens of WebQA and EDIS).
        """
        core = self.core
        embeds = core.language_model.embed_tokens(batch.input_ids)
        if batch.pixels is not None:
            assert batch.grids is not None and batch.image_rows is not None
            features = core.visual(batch.pixels.to(self.dtype), grid_thw=batch.grids).pooler_output
            has_image = torch.zeros(len(batch.lengths), dtype=torch.bool, device=embeds.device)
            has_image[batch.image_rows] = True
            slots = (batch.input_ids == self.processor.image_token_id) & has_image[:, None]
            embeds = embeds.masked_scatter(slots[..., None], features.to(embeds.dtype))
        length = batch.input_ids.shape[1]
        positions = torch.arange(length, device=embeds.device).expand(3, len(batch.lengths), length)
        hidden = core.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        rows = torch.arange(len(batch.lengths), device=hidden.device)
        pooled = hidden[rows, batch.lengths - 1].float()
        return l2_normalize(pooled, dim=-1) if normalize else pooled

    def encode(
        self,
        items: Sequence[Item | dict[str, Any] | str],
        normalize: bool = True,
        batch_tokens: int | None = None,
        max_items: int | None = None,
        progress: str | None = None,
    ) -> np.ndarray:
        """Vectors (N, D) float32 in the order of `items`; see `b3.encode.encode_items`."""
        from b3.encode import encode_items

        options: dict[str, Any] = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
        return encode_items(self, items, normalize=normalize, max_items=max_items, progress=progress, **options)
