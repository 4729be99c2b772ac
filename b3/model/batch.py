"""From items to what a forward pass takes: the contract of a processor, and items packed into batches.

A leaf of the model floor: backbones bring their own `Processor`; encoding and training handle its products alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from b3.data.items import Item

if TYPE_CHECKING:
    from PIL import Image

Tree = TypeVar("Tree")


@dataclass(frozen=True, slots=True)
class Processed:
    """One item as the model takes it.

    input_ids: (L,) int64 token ids, image tokens expanded.
    patches: (P, C, n) uint8 of its image, or None.
    grid: (rows, columns) of patches, P in all, or None.
    """

    input_ids: np.ndarray
    patches: np.ndarray | None = None
    grid: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


class Processor(ABC):
    """Turns an `Item` into `Processed` inputs. Cheap to pickle; safe in worker processes and in threads.

    A backbone without images does not implement `patch_bytes`; its `check` refuses images.
    """

    image_token_id: Any = -1  # the token that stands for a feature of an image; -1 equals no token

    @abstractmethod
    def check(self, item: Item) -> None:
        """Raise `DataError` if the backbone cannot read the item, as far as can be told without its image."""

    @abstractmethod
    def measure(self, item: Item) -> tuple[bytes, int]:
        """(SHA-256 of the content, number of tokens) of an item, without decoding its image.

        Raises `DataError` as processing would, as far as can be told.
        """

    @abstractmethod
    def token_ids(self, item: Item, grid: tuple[int, int] | None) -> np.ndarray:
        """(L,) int64 ids of an item whose image has this grid of patches (None: no image); reads no pixels.

        Raises `DataError` naming the item for an empty text or a misplaced image token.
        """

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write what the backbone's own software reads beside the weights: tokenizer, image budget."""

    def __call__(self, item: Item) -> Processed:
        """Process one item. Raises `DataError` as `token_ids` does."""
        self.check(item)
        return Processed(self.token_ids(item, None))

    def patch_bytes(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Patches (P, C, n) uint8 of an image and the grid (rows, columns), P = rows * columns."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Batch:
    """Processed items, packed end to end without padding.

    input_ids: (T,) int64. lengths: tokens of each of the B items, T in all.
    patches: (P, C, n) uint8 of all images in item order, or None: bytes, which `Embedder.features` makes numbers on its
    device. grids: (images, 3) int64 (1, rows, columns), always on the host. slots: (S,) int64, positions of the tokens
    that stand for the images' features, in the same order. layout: what `Embedder.layout` makes of the others.
    """

    input_ids: Tensor
    lengths: list[int]
    patches: Tensor | None = None
    grids: np.ndarray | None = None
    slots: Tensor | None = None
    layout: Any = None

    def __len__(self) -> int:
        return len(self.lengths)


def upload(tree: Tree, device: torch.device) -> Tree:
    """A copy of dataclasses, lists, tuples and dictionaries whose tensors are on a device.

    An accelerator gets one copy per dtype, from pinned memory: the host does not wait for it.
    """
    if device.type == "cpu":
        return tree
    waiting: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        return waiting.setdefault(id(tensor), tensor) if tensor.device.type == "cpu" else tensor

    _changed(tree, note)
    arrived: dict[int, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in waiting.values()}:
        group = {key: tensor for key, tensor in waiting.items() if tensor.dtype == dtype}
        sizes = [tensor.numel() for tensor in group.values()]
        pinned = torch.empty(sum(sizes), dtype=dtype, pin_memory=True)
        torch.cat([tensor.reshape(-1) for tensor in group.values()], out=pinned)
        parts = pinned.to(device, non_blocking=True).split(sizes)
        arrived |= {key: part.view(group[key].shape) for key, part in zip(group, parts, strict=True)}
    return _changed(tree, lambda tensor: arrived.get(id(tensor), tensor))


def _changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with `change` of each tensor in its place."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_changed(part, change) for part in tree)
    if isinstance(tree, dict):
        return {key: _changed(part, change) for key, part in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: _changed(getattr(tree, f.name), change) for f in fields(tree)})
    return tree


def collate(items: Sequence[Processed], image_token_id: int) -> Batch:
    """Pack processed items into one `Batch`.

    A placeholder in an item without image is no slot: it keeps its literal token embedding (stray tokens of WebQA and
    EDIS queries).
    """
    lengths = [item.num_tokens for item in items]
    input_ids = torch.from_numpy(np.concatenate([item.input_ids for item in items]))
    patches, grids, slots, start = [], [], [], 0
    for item, length in zip(items, lengths, strict=True):
        if item.patches is not None and item.grid is not None:
            patches.append(item.patches)
            grids.append((1, *item.grid))
            slots.append(start + np.flatnonzero(item.input_ids == image_token_id))
        start += length
    if not patches:
        return Batch(input_ids, lengths)
    return Batch(
        input_ids,
        lengths,
        torch.from_numpy(np.concatenate(patches)),
        np.asarray(grids, dtype=np.int64),
        torch.from_numpy(np.concatenate(slots)),
    )


def token_batches(
    lengths: Sequence[int] | np.ndarray, batch_tokens: int, max_items: int | None = None
) -> list[np.ndarray]:
    """Positions grouped so that the lengths of a group add up to at most `batch_tokens` (a longer one stands alone).

    Longest first, ties in order, so the grouping is a pure function of the lengths.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[np.ndarray] = []
    start, room = 0, batch_tokens
    for end, position in enumerate(order):
        room -= int(lengths[position])
        if end > start and (room < 0 or end - start == max_items):
            batches.append(order[start:end])
            start, room = end, batch_tokens - int(lengths[position])
    if len(order):
        batches.append(order[start:])
    return batches
