"""InternVL3 and 3.5 in transformers' form (checkpoints whose names end in -hf): images as tiles, a plain text model.

An image is resized to the grid of tiles (at most 12) whose aspect ratio is nearest to its own, and a thumbnail of the
whole follows if there is more than one. The tower sees each tile by itself. Positions are 1-D. B3's own models of this
kind were trained with ``prompt: b3_internvl``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from b3.data.items import Medium, Still, Video
from b3.errors import InputError
from b3.model.backbones.qwen_vl_images import resize
from b3.model.backbones.tiny import make_tiny_internvl
from b3.model.backbones.vision_language import VisionLanguage
from b3.model.batch import Grid, Visual, upload
from b3.model.embedder import Kept, Tower, linear_weights
from b3.model.media_processor import MediaProcessor
from b3.model.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

MAX_TILES = 12
# ImageNet's channel statistics, as in preprocessor_config.json of InternVL3.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@lru_cache(maxsize=4096)
def tile_grid(width: int, height: int, side: int = 448) -> tuple[int, int]:
    """(columns, rows) of tiles for an image of this size, at most 12 in all.

    The grid whose aspect ratio is nearest; of equally near ones a larger one if the image's area is more than half of
    what its tiles cover (OpenGVLab's dynamic_preprocess).
    """
    grids = sorted(
        {(c, r) for c in range(1, MAX_TILES + 1) for r in range(1, MAX_TILES + 1) if c * r <= MAX_TILES},
        key=lambda grid: grid[0] * grid[1],
    )
    best, distance = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        is_covered = width * height > 0.5 * side * side * columns * rows
        if difference < distance or (difference == distance and is_covered):
            best, distance = (columns, rows), difference
    return best


@dataclass(frozen=True)
class InternVLProcessor(MediaProcessor):
    """How InternVL cuts and writes images and videos.

    A grid is (tiles, rows, columns of patches in a tile). Frames of a video are one tile each.

    Args:
        side: pixels per side of a tile.
        patch: pixels per side of a patch; four patches are one token.
    """

    side: int = 448
    patch: int = 14
    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    video_token: ClassVar[str] = "<IMG_CONTEXT>"

    def num_features(self, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // 4

    def _grid(self, num_tiles: int) -> Grid:
        return num_tiles, self.side // self.patch, self.side // self.patch

    def grid(self, medium: Medium) -> tuple[bytes, Grid]:
        if isinstance(medium, Still):
            content, (width, height) = medium.peek()
            columns, rows = tile_grid(width, height, self.side)
            return content, self._grid(columns * rows + (columns * rows > 1))
        peeked = medium.peeked(self.settings.max_frames, self.settings.fps)
        return hashlib.sha256(b"".join(digest for digest, _ in peeked)).digest(), self._grid(len(peeked))

    def visual(self, medium: Medium) -> Visual:
        if isinstance(medium, Video):
            frames = medium.decoded(self.settings.max_frames, self.settings.fps)
            tiles = [resize(frame.convert("RGB"), self.side, self.side) for frame in frames]
        else:
            tiles = self._tiles(medium.open().convert("RGB"))
        grid, patch = self._grid(len(tiles)), self.patch
        blocks = np.stack([np.asarray(tile) for tile in tiles]).reshape(-1, grid[1], patch, grid[2], patch, 3)
        patches = blocks.transpose(0, 1, 3, 5, 2, 4)  # (tiles, rows, columns, C, patch, patch)
        return Visual(patches.reshape(math.prod(grid), 3, patch * patch), grid)

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        """Row by row, the thumbnail last."""
        side = self.side
        columns, rows = tile_grid(*image.size, side)
        whole = resize(image, columns * side, rows * side)
        places = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        tiles = [whole.crop((x, y, x + side, y + side)) for x, y in places]
        return tiles if len(tiles) == 1 else [*tiles, resize(image, side, side)]

    def written(self, medium: Medium, grid: Grid) -> Iterator[tuple[str, Grid]]:
        if isinstance(medium, Still) or not self.rule.wraps:
            yield f"<img>{self.image_token}</img>" if self.rule.wraps else self.image_token, grid
            return
        for frame in range(grid[0]):
            start = f"Frame{frame + 1}: " if frame == 0 else f"\nFrame{frame + 1}: "
            yield f"{start}<img>{self.image_token}</img>", (1, *grid[1:])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and a preprocessor_config.json, readable by transformers."""
        self.tokenizer.save_pretrained(str(folder))
        config = {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": MAX_TILES,
            "size": {"height": self.side, "width": self.side},
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tiles_of(patches: Tensor, side: int, patch: int) -> Tensor:
    """(tiles, 3, side, side) of patches (P, 3, patch * patch)."""
    count = side // patch
    blocks = patches.view(-1, count, count, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(-1, 3, side, side)


def pixels_of(tiles: Tensor) -> Tensor:
    """(tiles, 3, side, side) float32 of uint8, on the same device."""
    mean, std = _statistics_on(tiles.device)
    return (tiles.float() / 255 - mean) / std


@lru_cache(maxsize=8)
def _statistics_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """`MEAN` and `STD` (3, 1, 1) on a device, copied there once."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return upload((mean, std), device)


class InternVL(VisionLanguage):
    """An `Embedder` over upstream's `InternVLForConditionalGeneration`."""

    processor: InternVLProcessor
    title = "InternVL"
    upstream = "InternVLForConditionalGeneration"
    prompts: ClassVar[tuple[str, ...]] = ("plain", "vlm2vec", "b3_internvl")
    setting_names: ClassVar[tuple[str, ...]] = ("max_length", "numerics", "pooling", "prompt", "max_frames", "fps")

    @classmethod
    def make_processor(cls, tokenizer: Any, config: Any, settings: Settings) -> InternVLProcessor:
        if tokenizer.convert_tokens_to_ids(InternVLProcessor.image_token) != config.image_token_id:
            raise InputError(
                f"the tokenizer's {InternVLProcessor.image_token} is not token {config.image_token_id}, as config.json"
                " says; take the tokenizer of the checkpoint"
            )
        side, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
        return InternVLProcessor(tokenizer, settings, side, patch)

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        return make_tiny_internvl(folder, texts, seed)

    @property
    def vision(self) -> nn.Module:
        return nn.ModuleList([self.core.vision_tower, self.core.multi_modal_projector])

    def vision_layers(self) -> list[nn.Module]:
        return list(self.core.vision_tower.encoder.layer)

    def vision_cost(self) -> Tower:
        """The projector runs once for four patches."""
        core, config = self.core, self.core.vision_tower.config
        tower, projector = linear_weights(core.vision_tower), linear_weights(core.multi_modal_projector)
        weights, trained = (a + b // 4 for a, b in zip(tower, projector, strict=True))
        kept = Kept(24, dora=20, dropout=4, outside=8)
        return Tower(weights, trained, config.num_hidden_layers, config.hidden_size, kept)

    def features(self, patches: Tensor, grids: np.ndarray) -> Tensor:
        """(S, D) features of the tokens of (P, 3, n) uint8 patches."""
        core, patches = self.core, upload(patches, self.device)
        tiles = tiles_of(patches, self.processor.side, self.processor.patch)
        output = core.get_image_features(
            pixel_values=pixels_of(tiles).to(self.dtype),
            vision_feature_layer=core.config.vision_feature_layer,
            vision_feature_select_strategy=core.config.vision_feature_select_strategy,
        ).pooler_output
        features: Tensor = output.reshape(-1, output.shape[-1])
        return features
