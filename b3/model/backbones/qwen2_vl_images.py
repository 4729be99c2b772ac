"""From items to model inputs: raw prompts, image budget and patches, exactly as the published checkpoints expect.

The rules are those of the B3 evaluation release and differ from the stock Qwen2-VL processor in four ways: prompts are
raw text; an image with a side below 28 pixels is first resized to 56 x 56; an aspect ratio above 200 is squared
instead of refused; a placeholder in a text without image stays one literal token. Images are handled by PIL
(bicubic on uint8), alpha is dropped and EXIF rotation is ignored, as in the reference.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from b3.data.items import Item
from b3.data.prompts import PLACEHOLDER, to_backbone
from b3.errors import DataError, InputError
from b3.model.attention import Packing
from b3.model.batch import Processed, Processor, upload
from b3.model.checkpoint import load_tokenizer

if TYPE_CHECKING:
    from PIL import Image

PATCH = 14
MERGE = 2
FACTOR = PATCH * MERGE
TEMPORAL = 2
MIN_PIXELS = 4 * FACTOR * FACTOR
MAX_PIXELS = 1280 * FACTOR * FACTOR
MAX_ASPECT = 200
# CLIP's channel statistics, as in preprocessor_config.json of Qwen2-VL.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_TOKEN = "<|image_pad|>"


def target_size(height: int, width: int, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width after resizing: multiples of 28 whose area lies in [min_pixels, max_pixels].

    Rounding is Python's half-to-even; a side below 28 or an aspect ratio above 200 first becomes the square of the
    longer side (reference variant; the stock processor raises).
    """
    if min(height, width) < FACTOR or max(height, width) / min(height, width) > MAX_ASPECT:
        height = width = max(FACTOR, height, width)
    rows, columns = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(FACTOR, math.floor(height / scale / FACTOR) * FACTOR)
        columns = max(FACTOR, math.floor(width / scale / FACTOR) * FACTOR)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / FACTOR) * FACTOR
        columns = math.ceil(width * scale / FACTOR) * FACTOR
    return rows, columns


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize with PIL's default filter of the mode, width first, then height.

    One call would let Pillow choose the order of the two passes, and it chooses differently from version to version;
    each pass rounds to 8 bit, so the order shows in the pixels.
    """
    if image.mode in ("1", "P"):  # nearest: one pass, no rounding
        return image.resize((width, height))
    if image.mode in ("RGBA", "LA"):  # resize in premultiplied colours, as PIL does within one call
        premultiplied = image.convert("RGBa" if image.mode == "RGBA" else "La")
        return premultiplied.resize((width, image.height)).resize((width, height)).convert(image.mode)
    return image.resize((width, image.height)).resize((width, height))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB without transparency: alpha and palette transparency are dropped, not composited (reference)."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def byte_values() -> np.ndarray:
    """(256, 3) float32: the value of each byte in each channel, by the stock formula in its own precision."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.asarray(MEAN, dtype=np.float32), np.asarray(STD, dtype=np.float32)
    return (scaled[:, None] - mean) / std


@lru_cache(maxsize=8)
def _values_on(device: torch.device) -> Tensor:
    """`byte_values` on a device, copied there once."""
    with torch.inference_mode(False):
        return upload(torch.from_numpy(byte_values()), device)


def pixels_of(patches: Tensor) -> Tensor:
    """(P, 1176) float32, what the vision tower takes, of patches (P, 3, 196) uint8 on the same device."""
    table = _values_on(patches.device)
    channels = torch.stack([table[:, c][patches[:, c].int()] for c in range(3)], dim=1)
    frames = channels[:, :, None].expand(-1, -1, TEMPORAL, -1)  # an image is a film of two equal frames
    return frames.reshape(len(patches), -1)


@dataclass(frozen=True, slots=True)
class TowerLayout:
    """What the vision tower needs to know of its images. positions: (P, 2) int64, each patch's row and column."""

    positions: Tensor
    packing: Packing

    @classmethod
    def of(cls, grids: np.ndarray, is_bucketed: bool) -> TowerLayout:
        """Of images with these grids, (images, 3) (1, rows, columns); patches come in squares of MERGE x MERGE."""
        positions = []
        for _, rows, columns in grids.tolist():
            places = np.indices((rows, columns)).reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
            positions.append(places.transpose(1, 3, 2, 4, 0).reshape(-1, 2))
        packing = Packing.of(grids[:, 1] * grids[:, 2], False, equal=True, is_bucketed=is_bucketed)
        return cls(torch.from_numpy(np.concatenate(positions)), packing)


@dataclass(frozen=True)
class Qwen2VLProcessor(Processor):
    """Turns an `Item` into `Processed` inputs. Cheap to pickle; safe in worker processes.

    Args:
        tokenizer: a fast tokenizer of the backbone.
        min_pixels, max_pixels: image budget in pixels; overrides what the checkpoint says (reference).
        max_length: cuts text-only items on the right; items with an image are never cut. None: no limit.
        image_token: the backbone's image token.
        square: first resize every image to this many pixels per side, aspect ratio lost (VLM2Vec V1 evaluations).
    """

    tokenizer: Any
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    max_length: int | None = None
    image_token: str = IMAGE_TOKEN
    square: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} must be positive and at most max_pixels {self.max_pixels}")

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Qwen2VLProcessor:
        """With the tokenizer of a checkpoint. Raises `InputError` if there is none."""
        return cls(load_tokenizer(name), **options)

    @cached_property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "image_token_id"}

    def tokens_of_image(self, width: int, height: int) -> int:
        """How many image tokens an image of this size takes; reads no pixels."""
        if self.square is not None:
            width = height = self.square
        if min(width, height) < FACTOR:
            width = height = 2 * FACTOR
        rows, columns = target_size(height, width, self.min_pixels, self.max_pixels)
        return rows * columns // (FACTOR * FACTOR)

    def patch_bytes(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Patches (P, 3, 196) uint8 in the backbone's order and the grid (rows, columns) with P = rows * columns.

        An eighth of what `pixels_of` makes of them.
        """
        if self.square is not None:
            image = _resize(to_rgb(image), self.square, self.square)
        if min(image.size) < FACTOR:
            image = _resize(image, 2 * FACTOR, 2 * FACTOR)
        image = to_rgb(image)
        height, width = target_size(image.height, image.width, self.min_pixels, self.max_pixels)
        if (width, height) != image.size:
            image = _resize(image, width, height)
        values = np.asarray(image)
        rows, columns = height // PATCH, width // PATCH
        blocks = values.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # (h/2, w/2, 2, 2, C, 14, 14)
        return blocks.reshape(rows * columns, 3, PATCH * PATCH), (rows, columns)

    def check(self, item: Item) -> None:
        """Raise `DataError` if the backbone cannot read the item, as far as can be told without its image."""
        if item.image is not None:
            self._check_placeholder(to_backbone(item.text, self.image_token), item)

    def measure(self, item: Item) -> tuple[bytes, int]:
        """(digest of the content, number of tokens) of an item, without decoding its image.

        The digest covers the prompt and the image's encoded bytes: equal images under different names are one.
        Raises `DataError` as processing would, as far as can be told.
        """
        self.check(item)
        text = to_backbone(item.text, self.image_token)
        digest = hashlib.sha256(text.encode())
        if item.image is None:
            return digest.digest(), len(self.token_ids(item, None))
        content, size = item.peek_image()
        digest.update(b"\0" + content)
        return digest.digest(), len(self._tokenize(text, item)) - 1 + self.tokens_of_image(*size)

    def _check_placeholder(self, text: str, item: Item) -> None:
        if text.count(self.image_token) != 1:
            raise DataError(
                f"{item.describe()}: a text with an image needs exactly one {PLACEHOLDER} or {self.image_token},"
                f" found {text.count(self.image_token)}"
            )

    def __call__(self, item: Item) -> Processed:
        """Process one item. Raises `DataError` naming the item for an empty text or a misplaced image token."""
        self.check(item)
        image = item.open_image()
        if image is None:
            return Processed(self.token_ids(item, None))
        patches, grid = self.patch_bytes(image)
        return Processed(self.token_ids(item, grid), patches, grid)

    def token_ids(self, item: Item, grid: tuple[int, int] | None) -> np.ndarray:
        """(L,) int64 ids of an item whose image has this grid of patches (None: no image); reads no pixels.

        Raises `DataError` as `__call__` does.
        """
        text = to_backbone(item.text, self.image_token)
        if grid is None:
            return self._tokenize(text, item)[: self.max_length]
        self._check_placeholder(text, item)
        return self._expand(self._tokenize(text, item), grid[0] * grid[1] // (MERGE * MERGE))

    def _tokenize(self, text: str, item: Item) -> np.ndarray:
        # the backend's own call: unlike the wrapper's it may run in several threads at once
        ids = np.asarray(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        if len(ids) == 0:
            raise DataError(f"{item.describe()}: an item needs a text or an image")
        return ids

    def _expand(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Repeat the single image token `count` times."""
        position = int(np.flatnonzero(ids == self.image_token_id)[0])
        run = np.full(count, self.image_token_id, dtype=np.int64)
        return np.concatenate([ids[:position], run, ids[position + 1 :]])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and a preprocessor_config.json with the image budget, readable by transformers."""
        self.tokenizer.save_pretrained(str(folder))
        config = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": PATCH,
            "merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
