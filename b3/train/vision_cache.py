"""Features of a step's images: with a frozen vision tower each distinct image is seen once.

The tower is most of the work of a short prompt with an image, and its output depends neither on the prompt nor on the
adapter of the language model. So it is kept between the two passes of a cached step and shared by all items of the
rank that show the same image. If any parameter of the tower is trained, nothing is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from b3.model.embedder import Embedder
from b3.train.inputs import Chunk, Images


def is_vision_frozen(embedder: Embedder) -> bool:
    """Whether no parameter of the vision tower is trained, or there is none."""
    vision = embedder.vision
    return vision is None or not any(parameter.requires_grad for parameter in vision.parameters())


class VisionCache:
    """Gives the features of a chunk's images, from memory where possible. Lives for one step.

    Args:
        embedder: the model.
        images: of the step, or None if no item has one.
        limit_bytes: what may be kept; images beyond it are seen again in each pass.
    """

    def __init__(self, embedder: Embedder, images: Images | None, limit_bytes: int) -> None:
        self.embedder = embedder
        self.images = images
        self.is_frozen = is_vision_frozen(embedder)
        self.limit_bytes = limit_bytes if self.is_frozen else 0
        self.num_bytes = 0
        self._memory: dict[int, Tensor] = {}

    def features(self, chunk: Chunk) -> Tensor | None:
        """(S, D) features of the chunk's image tokens, in order; None without images."""
        if not chunk.images:
            return None
        missing = [number for number in dict.fromkeys(chunk.images) if number not in self._memory]
        features = {**self._memory, **(self._compute(missing) if missing else {})}
        return torch.cat([features[number] for number in chunk.images])

    def _compute(self, numbers: list[int]) -> dict[int, Tensor]:
        """Features (tokens, D) of some images by their numbers; kept as long as there is room."""
        assert self.images is not None
        images = self.images.select(numbers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            output = self.embedder.features(images.patches, images.grids)
        parts = output.split(images.num_features)
        features = dict(zip(numbers, parts, strict=True))
        for number, part in features.items():
            if self.num_bytes + part.nbytes <= self.limit_bytes:
                self._memory[number] = part.clone()  # a view would hold the whole output
                self.num_bytes += part.nbytes
        return features
