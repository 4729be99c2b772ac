"""From items to inputs of the Qwen-VL family: prompts, image and video budgets, patches, positions.

Three ways to resize exist, and the prompt rule names the one that its published checkpoints were made with:

- "vlm2vec" (VLM2Vec, B3): an image with a side below 28 pixels is first resized to 56 x 56; an aspect ratio above 200
  is squared instead of refused; transparency is dropped; all frames of a video take the first one's size.
- "qwen_vl_utils" (Qwen3-VL-Embedding): transparent images are laid on white; an aspect ratio above 200 is refused;
  frames are resized twice, each by its own size and then the clip by a budget that shrinks with the number of frames.
- "gme": images are resized twice, first with room for 16,384 tokens and an aspect ratio of at most 200.

Images are handled by PIL (bicubic on uint8) and EXIF rotation is ignored, as in the references.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from b3.data.items import Medium, Still
from b3.errors import DataError, InputError
from b3.model.batch import Grid, Visual, upload
from b3.model.checkpoint import load_tokenizer
from b3.model.media_processor import MediaProcessor
from b3.model.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

MERGE = 2  # patches per side of a token
TEMPORAL = 2  # frames per patch
MAX_ASPECT = 200
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 1280 * 28 * 28


@dataclass(frozen=True, slots=True)
class Pixels:
    """What a vision tower takes: pixels per side of a patch, and each channel's mean and standard deviation."""

    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def factor(self) -> int:
        """Pixels per side of a token."""
        return self.patch * MERGE

    def values(self) -> np.ndarray:
        """(256, 3) float32: the value of each byte in each channel, by the stock formula in its own precision."""
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        return (scaled[:, None] - np.asarray(self.mean, dtype=np.float32)) / np.asarray(self.std, dtype=np.float32)

    def numbers(self, patches: Tensor) -> Tensor:
        """(P, 6 patch^2) float32, what the vision tower takes, of patches (P, 3, n) uint8 on the same device.

        n is patch^2 for images, which are films of two equal frames, or twice that.
        """
        table = _values_on(self, patches.device)
        channels = torch.stack([table[:, c][patches[:, c].int()] for c in range(3)], dim=1)
        frames = channels.view(len(patches), 3, -1, self.patch * self.patch)
        return frames.expand(-1, -1, TEMPORAL, -1).reshape(len(patches), -1)


@lru_cache(maxsize=8)
def _values_on(pixels: Pixels, device: torch.device) -> Tensor:
    """`Pixels.values` on a device, copied there once."""
    with torch.inference_mode(False):
        return upload(torch.from_numpy(pixels.values()), device)


# CLIP's channel statistics, as in preprocessor_config.json of Qwen2-VL and Qwen2.5-VL.
CLIP = Pixels(14, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Pixels(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # Qwen3-VL, Qwen3.5


def target_size(
    height: int, width: int, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS, factor: int = 28
) -> tuple[int, int]:
    """Height and width after resizing: multiples of `factor` whose area lies in [min_pixels, max_pixels].

    Rounding is Python's half-to-even; a side below `factor` or an aspect ratio above 200 first becomes the square of
    the longer side (reference variant; the stock processor raises).
    """
    if min(height, width) < factor or max(height, width) / min(height, width) > MAX_ASPECT:
        height = width = max(factor, height, width)
    rows, columns = stock_size(height, width, min_pixels, max_pixels, factor)
    return max(factor, rows), max(factor, columns)


def stock_size(height: int, width: int, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """As `target_size`, by the rule of qwen_vl_utils: too small sides become one factor, no guard for the aspect."""
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(side / scale / factor) * factor for side in (height, width))
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


def gme_first_size(height: int, width: int) -> tuple[int, int]:
    """The first of GME's two resizes: up to 16,384 tokens, then the longer side cut to 200 times the shorter."""
    rows, columns = stock_size(height, width, MIN_PIXELS, 16384 * 28 * 28, 28)
    if max(rows, columns) / min(rows, columns) > MAX_ASPECT:
        rows, columns = min(rows, columns * MAX_ASPECT), min(columns, rows * MAX_ASPECT)
    return rows, columns


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize with PIL's default filter of the mode, width first, then height.

    One call would let Pillow choose the order of the two passes, and it chooses differently from version to version;
    each pass rounds to 8 bit, so the order shows in the pixels.
    """
    if image.size == (width, height):
        return image
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


def on_white(image: Image.Image) -> Image.Image:
    """RGB, an RGBA image laid on white (qwen_vl_utils)."""
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.split()[3])
    return white


@dataclass(frozen=True)
class Resizing:
    """How media become arrays of multiples of a token: one subclass for each of the references.

    Budgets are in pixels, per image and (in "vlm2vec") per frame.
    """

    pixels: Pixels
    min_pixels: int
    max_pixels: int
    square: int | None = None  # first resize every image to this many pixels per side (VLM2Vec V1 evaluations)

    def image_size(self, width: int, height: int, name: str) -> tuple[int, int]:
        """(height, width) after all resizing."""
        if self.square is not None:
            width = height = self.square
        if min(width, height) < self.pixels.factor:
            width = height = 2 * self.pixels.factor
        return target_size(height, width, self.min_pixels, self.max_pixels, self.pixels.factor)

    def image(self, image: Image.Image, name: str) -> np.ndarray:
        """(height, width, 3) uint8."""
        if self.square is not None:
            image = resize(image, self.square, self.square)
        if min(image.size) < self.pixels.factor:
            image = resize(image, 2 * self.pixels.factor, 2 * self.pixels.factor)
        image = to_rgb(image)
        height, width = self.image_size(image.width, image.height, name)
        return np.asarray(resize(image, width, height))

    def frame_size(self, sizes: list[tuple[int, int]], name: str) -> tuple[int, int]:
        """(height, width) that all frames take, of their sizes (width, height); an odd number has its last twice."""
        width, height = (self.square, self.square) if self.square is not None else sizes[0]
        return target_size(height, width, self.min_pixels, self.max_pixels, self.pixels.factor)

    def frames(self, images: list[Image.Image], name: str) -> np.ndarray:
        """(frames, height, width, 3) uint8, an odd number not yet made even."""
        height, width = self.frame_size([image.size for image in images], name)
        if self.square is not None:
            images = [resize(image, self.square, self.square) for image in images]
        return np.stack([np.asarray(resize(to_rgb(image), width, height)) for image in images])


class GMEResizing(Resizing):
    """Two resizes of an image."""

    def image_size(self, width: int, height: int, name: str) -> tuple[int, int]:
        first = gme_first_size(height, width)
        return super().image_size(first[1], first[0], name)

    def image(self, image: Image.Image, name: str) -> np.ndarray:
        height, width = gme_first_size(image.height, image.width)
        return super().image(resize(image.convert("RGB"), width, height), name)


class QwenUtilsResizing(Resizing):
    """qwen_vl_utils 0.0.14 as Qwen3-VL-Embedding's script calls it."""

    min_frame_pixels = 128 * 32 * 32
    max_frame_pixels = 768 * 32 * 32
    total_pixels = 10 * 768 * 32 * 32

    def image_size(self, width: int, height: int, name: str) -> tuple[int, int]:
        self._check_aspect(width, height, name)
        return stock_size(height, width, self.min_pixels, self.max_pixels, self.pixels.factor)

    def image(self, image: Image.Image, name: str) -> np.ndarray:
        height, width = self.image_size(image.width, image.height, name)
        return np.asarray(resize(on_white(image), width, height))

    def _check_aspect(self, width: int, height: int, name: str) -> None:
        if max(width, height) / min(width, height) > MAX_ASPECT:
            raise DataError(
                f"image {name} is {width} x {height}: its aspect ratio is above {MAX_ASPECT}, which the script of"
                " Qwen3-VL-Embedding cannot read; crop it or drop the row"
            )

    def _single_size(self, size: tuple[int, int], name: str) -> tuple[int, int]:
        """(height, width) of a frame by itself: the script passes the token's pixels where a patch's are expected."""
        self._check_aspect(*size, name)
        factor = MERGE * self.pixels.factor
        return stock_size(size[1], size[0], 4 * factor * factor, 16384 * factor * factor, factor)

    def frame_size(self, sizes: list[tuple[int, int]], name: str) -> tuple[int, int]:
        singles = [self._single_size(size, name) for size in sizes]
        other = next((i for i, single in enumerate(singles) if single != singles[0]), None)
        if other is not None:
            raise DataError(
                f"video {name}: frame {other + 1} is {sizes[other][0]} x {sizes[other][1]}, the first"
                f" {sizes[0][0]} x {sizes[0][1]}; frames of a video need one size"
            )
        even = math.ceil(len(sizes) / TEMPORAL) * TEMPORAL
        budget = min(self.max_frame_pixels, self.total_pixels / even * TEMPORAL)
        budget = max(budget, int(self.min_frame_pixels * 1.05))
        return stock_size(*singles[0], self.min_frame_pixels, int(budget), self.pixels.factor)

    def frames(self, images: list[Image.Image], name: str) -> np.ndarray:
        sizes = [image.size for image in images]
        size = self.frame_size(sizes, name)
        height, width = self._single_size(sizes[0], name)
        clip = np.stack([np.asarray(resize(on_white(image), width, height)) for image in images])
        if size == (height, width):
            return clip
        # torch's antialiased bicubic in float32, as torchvision resizes tensors; PIL differs by up to 23 levels
        tensor = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
        scaled = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True)
        return scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


RESIZING: dict[str, type[Resizing]] = {
    "vlm2vec": Resizing,
    "gme": GMEResizing,
    "qwen_vl_utils": QwenUtilsResizing,
}


@dataclass(frozen=True)
class QwenVLProcessor(MediaProcessor):
    """How the Qwen-VL family resizes, cuts and writes images and videos.

    Args:
        pixels: what the vision tower takes.
        is_video_split: each step of a video is an image of its own, written after its time (Qwen3-VL).
        step: positions in time per two frames (Qwen2.5-VL: tokens per second, a list of frames being 2 fps).
    """

    pixels: Pixels = CLIP
    is_video_split: bool = False
    step: int = 1
    image_token: ClassVar[str] = "<|image_pad|>"
    video_token: ClassVar[str] = "<|video_pad|>"

    def __post_init__(self) -> None:
        low, high = self.settings.min_pixels, self.settings.max_pixels
        if not 0 < low <= high:
            raise InputError(f"min_pixels {low} must be positive and at most max_pixels {high}")

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> QwenVLProcessor:
        """With the tokenizer of a checkpoint. Raises `InputError` if there is none."""
        return cls(load_tokenizer(name), Settings(**settings))

    @cached_property
    def resizing(self) -> Resizing:
        one = self.settings
        return RESIZING[self.rule.resizing](self.pixels, one.min_pixels, one.max_pixels, one.square)

    def num_features(self, grid: Grid) -> int:
        return grid[0] * grid[1] * grid[2] // (MERGE * MERGE)

    def _grid(self, num_frames: int, size: tuple[int, int]) -> Grid:
        return math.ceil(num_frames / TEMPORAL), size[0] // self.pixels.patch, size[1] // self.pixels.patch

    def grid(self, medium: Medium) -> tuple[bytes, Grid]:
        if isinstance(medium, Still):
            content, size = medium.peek()
            return content, self._grid(1, self.resizing.image_size(*size, medium.name))
        peeked = medium.peeked(self.settings.max_frames, self.settings.fps)
        content = hashlib.sha256(b"".join(digest for digest, _ in peeked)).digest()
        return content, self._grid(len(peeked), self.resizing.frame_size([size for _, size in peeked], medium.name))

    def visual(self, medium: Medium) -> Visual:
        if isinstance(medium, Still):
            frames = self.resizing.image(medium.open(), medium.name)[None]
        else:
            frames = self.resizing.frames(medium.decoded(self.settings.max_frames, self.settings.fps), medium.name)
            if len(frames) % TEMPORAL:
                frames = np.concatenate([frames, frames[-1:]])
        return self._patches(frames)

    def _patches(self, frames: np.ndarray) -> Visual:
        """Patches (P, 3, n) in the backbone's order of frames (f, height, width, 3); one frame: n is its own pixels."""
        patch, (num_frames, height, width, _) = self.pixels.patch, frames.shape
        depth = min(num_frames, TEMPORAL)
        grid = (num_frames // depth, height // patch, width // patch)
        blocks = frames.reshape(grid[0], depth, grid[1] // MERGE, MERGE, patch, grid[2] // MERGE, MERGE, patch, 3)
        blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, C, depth, patch, patch)
        return Visual(blocks.reshape(math.prod(grid), 3, -1), grid)

    def written(self, medium: Medium, grid: Grid) -> Iterator[tuple[str, Grid]]:
        wrap = "<|vision_start|>{}<|vision_end|>" if self.rule.wraps else "{}"
        if isinstance(medium, Still):
            yield wrap.format(self.image_token), grid
        elif not self.is_video_split:
            yield wrap.format(self.video_token), grid
        else:  # transformers 4.57: times of frames at 2 fps, no outer pair of tokens around the steps
            for step in range(grid[0]):
                time = f"<{(2 * step + 0.5) / 2:.1f} seconds>" if self.rule.wraps else ""
                yield time + wrap.format(self.video_token), (1, *grid[1:])

    def positions(self, length: int, spans: list[tuple[int, Grid]]) -> np.ndarray:
        return mrope_positions(length, spans, self.step)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and a preprocessor_config.json with the image budget, readable by transformers."""
        self.tokenizer.save_pretrained(str(folder))
        config = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": self.settings.min_pixels,
            "max_pixels": self.settings.max_pixels,
            "patch_size": self.pixels.patch,
            "merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "image_mean": list(self.pixels.mean),
            "image_std": list(self.pixels.std),
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def mrope_positions(length: int, spans: list[tuple[int, Grid]], step: int = 1) -> np.ndarray:
    """(3, length) int64 temporal, height and width positions of a row.

    A text token is one further than the largest position before it, on all axes. Of a medium whose first token is at
    position p, the token at (t, row, column) has (p + t step, p + row, p + column). The next text continues at the
    largest position used + 1: transformers 4.52 to 4.57, which the published checkpoints were trained with; 5.x
    continues after max(rows, columns) and so lets the text overlap a long video
    (https://github.com/huggingface/transformers/issues/45381).

    spans: (first token, grid) of each medium, in order. step: positions in time per step of a grid.
    """
    positions = np.empty((3, length), dtype=np.int64)
    end, next_position = 0, 0
    for start, (steps, rows, columns) in spans:
        positions[:, end:start] = np.arange(next_position, next_position + start - end)
        next_position += start - end
        grid = np.indices((steps, rows // MERGE, columns // MERGE)).reshape(3, -1)
        grid[0] *= step
        end = start + grid.shape[1]
        positions[:, start:end] = grid + next_position
        next_position = int(positions[:, start:end].max()) + 1
    positions[:, end:] = np.arange(next_position, next_position + length - end)
    return positions
