"""What a rank needs for one step, in a few flat tensors: cheap to hand from a worker process to the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from b3.model.batch import Batch


@dataclass(frozen=True, slots=True)
class Pictures:
    """Distinct pictures as bytes, an eighth of what the vision tower takes (see `Processor.patch_bytes`).

    patches: (P, 3, 196) uint8 of all pictures in order. grids: (pictures, 3) int64 (1, rows, columns).
    table: (256, 3) float32, what each byte stands for in each channel.
    """

    patches: Tensor
    grids: Tensor
    table: Tensor

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def sizes(self) -> list[int]:
        """Patches of each picture."""
        return self.grids.prod(dim=1).tolist()

    def pixels(self, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(pixels (P, 1176) float32, grids) of some pictures, as `Batch` holds them."""
        edges = np.concatenate([[0], np.cumsum(self.sizes)])
        parts = [self.patches[edges[i] : edges[i + 1]] for i in chosen]
        values = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device, non_blocking=True)
        table = self.table.to(device)
        channels = torch.stack([table[:, c][values[:, c].int()] for c in range(3)], dim=1)
        frames = channels[:, :, None].expand(-1, -1, 2, -1)  # a picture is a film of two equal frames
        return frames.reshape(len(values), -1), self.grids[list(chosen)].to(device)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some of a rank's distinct items, as one forward pass takes them.

    batch: without pixels. rows: (B,) int64 positions among the rank's distinct items.
    pictures: number of the picture of each item that has one, in item order.
    """

    batch: Batch
    rows: Tensor
    pictures: list[int]


@dataclass(frozen=True)
class StepInputs:
    """One rank's share of a batch: b rows, each with a positive and h hard negatives.

    input_ids: (T,) int64 of the rank's distinct items, end to end. lengths: tokens of each.
    picture_of: number of each item's picture in `pictures`, or -1.
    groups: (B,) int64 arrays of item numbers, one a chunk; every item is in exactly one.
    image_token_id: the token that stands for a picture's features.
    query_index: (b,) and target_index: (b (1 + h),) int64 positions among the distinct items.
    query_ids: (b,) and target_ids: (b (1 + h),) int64, equal for equal items.
    valid: (b (1 + h),) bool, False for padding.
    teacher_queries: (b, D) and teacher_targets: (b (1 + h), D), a teacher's vectors of the same rows, or None.
    """

    input_ids: Tensor
    lengths: list[int]
    picture_of: list[int]
    pictures: Pictures | None
    groups: list[np.ndarray]
    image_token_id: int
    query_index: Tensor
    target_index: Tensor
    query_ids: Tensor
    target_ids: Tensor
    valid: Tensor
    teacher_queries: Tensor | None = None
    teacher_targets: Tensor | None = None

    @property
    def num_items(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_chunks(self) -> int:
        return len(self.groups)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def chunk(self, number: int) -> Chunk:
        """The inputs of one forward pass."""
        group, starts = self.groups[number], self._starts
        parts = [self.input_ids[starts[i] : starts[i + 1]] for i in group]
        ids, lengths = torch.cat(parts), [self.lengths[i] for i in group]
        pictures = [self.picture_of[i] for i in group if self.picture_of[i] >= 0]
        rows = torch.from_numpy(group.copy())
        if not pictures:
            return Chunk(Batch(ids, lengths), rows, pictures)
        assert self.pictures is not None
        with_picture = torch.tensor([self.picture_of[i] >= 0 for i in group])
        slots = (ids == self.image_token_id) & with_picture.repeat_interleave(torch.tensor(lengths))
        batch = Batch(ids, lengths, grids=self.pictures.grids[pictures], slots=slots.nonzero()[:, 0])
        return Chunk(batch, rows, pictures)
