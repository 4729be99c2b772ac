"""From items to what a forward pass takes: the contract of a processor, and items packed into batches.

A leaf of the model floor: backbones bring their own `Processor`; encoding and training handle its products alike. A
medium (an image or a video) becomes a `Visual` by itself: its patches depend neither on the text nor on other media.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from b3.data.items import Item, Medium

Tree = TypeVar("Tree")
Grid: TypeAlias = tuple[int, int, int]  # steps in time, rows and columns of patches


@dataclass(frozen=True, slots=True)
class Visual:
    """An image or a video as the vision tower takes it.

    patches: (P, C, n) uint8. grid: its product is P.
    """

    patches: np.ndarray
    grid: Grid


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one item.

    input_ids: (L,) int64, the tokens of media expanded.
    slots: (S,) int64, where the features of its media go, in order.
    positions: (3, L) int64 temporal, height and width positions; None: 0..L-1 on all axes.
    """

    input_ids: np.ndarray
    slots: np.ndarray
    positions: np.ndarray | None = None

    @classmethod
    def of_text(cls, input_ids: np.ndarray) -> Tokens:
        """Without media."""
        return cls(input_ids, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Processed:
    """One item as the model takes it: its tokens, and its media in the order of their slots."""

    tokens: Tokens
    visuals: tuple[Visual, ...] = ()

    @property
    def input_ids(self) -> np.ndarray:
        return self.tokens.input_ids

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class Processor(ABC):
    """Turns an `Item` into `Processed` inputs. Cheap to pickle; safe in worker processes and in threads.

    A backbone without vision implements `check` (which refuses media), `tokens` and `save_pretrained` alone.
    """

    @abstractmethod
    def check(self, item: Item) -> None:
        """Raise `DataError` if the backbone cannot read the item, as far as can be told without its media."""

    @abstractmethod
    def tokens(self, item: Item, grids: Sequence[Grid]) -> Tokens:
        """The tokens of an item whose media, in the order of `media`, have these grids; reads no pixels.

        Raises `DataError` naming the item for an empty text or media that have no place in it.
        """

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write what the backbone's own software reads beside the weights: tokenizer, image budget."""

    def content(self, item: Item) -> str:
        """All that decides the tokens beside the media's grids."""
        return item.text or ""

    def media(self, item: Item) -> tuple[Medium, ...]:
        """The item's media in the order in which the model reads them."""
        return ()

    def grid(self, medium: Medium) -> tuple[bytes, Grid]:
        """(digest of the content, grid) of a medium, from its header alone."""
        raise NotImplementedError

    def visual(self, medium: Medium) -> Visual:
        """A medium decoded, resized and cut into patches. Raises `DataError` if it does not decode."""
        raise NotImplementedError

    def num_features(self, grid: Grid) -> int:
        """How many features, hence tokens, a medium with this grid has."""
        raise NotImplementedError

    def measure(self, item: Item) -> tuple[bytes, int]:
        """(SHA-256 of the content, number of tokens) of an item, without decoding its media.

        The digest covers the prompt and the media's encoded bytes: equal images under different names are one.
        Raises `DataError` as processing would, as far as can be told.
        """
        self.check(item)
        digest = hashlib.sha256(self.content(item).encode())
        grids = []
        for medium in self.media(item):
            content, grid = self.grid(medium)
            digest.update(b"\0" + content)
            grids.append(grid)
        return digest.digest(), len(self.tokens(item, grids))

    def __call__(self, item: Item) -> Processed:
        """Process one item. Raises `DataError` as `tokens` and `visual` do."""
        self.check(item)
        visuals = tuple(self.visual(medium) for medium in self.media(item))
        return Processed(self.tokens(item, [visual.grid for visual in visuals]), visuals)


@dataclass(frozen=True, slots=True)
class Batch:
    """Processed items, packed end to end without padding.

    input_ids: (T,) int64. lengths: tokens of each of the B items, T in all.
    patches: (P, C, n) uint8 of all media in item order, or None: bytes, which `Embedder.features` makes numbers on its
    device. grids: (media, 3) int64 (steps, rows, columns), always on the host. slots: (S,) int64, positions of the
    tokens that stand for the media's features, in the same order. positions: (3, T) int64, or None: 0..L-1 in each
    item. layout: what `Embedder.layout` makes of the others.
    """

    input_ids: Tensor
    lengths: list[int]
    patches: Tensor | None = None
    grids: np.ndarray | None = None
    slots: Tensor | None = None
    positions: Tensor | None = None
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


def join_patches(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Patches (P, C, n) of several media end to end. Beside a video, whose patches span two frames, an image is two."""
    width = max(part.shape[2] for part in parts)
    return np.concatenate([np.tile(part, (1, 1, width // part.shape[2])) for part in parts])


def join_positions(tokens: Sequence[Tokens]) -> np.ndarray | None:
    """(3, T) positions of items end to end; None if all are 0..L-1."""
    if all(one.positions is None for one in tokens):
        return None
    return np.concatenate([_positions(one) for one in tokens], axis=1)


def _positions(tokens: Tokens) -> np.ndarray:
    if tokens.positions is not None:
        return tokens.positions
    return np.broadcast_to(np.arange(len(tokens)), (3, len(tokens)))


def collate(items: Sequence[Processed]) -> Batch:
    """Pack processed items into one `Batch`."""
    tokens = [item.tokens for item in items]
    starts = np.cumsum([0, *map(len, tokens)])
    positions = join_positions(tokens)
    batch = Batch(
        torch.from_numpy(np.concatenate([one.input_ids for one in tokens])),
        [len(one) for one in tokens],
        positions=None if positions is None else torch.from_numpy(positions),
    )
    visuals = [visual for item in items for visual in item.visuals]
    if not visuals:
        return batch
    return replace(
        batch,
        patches=torch.from_numpy(join_patches([visual.patches for visual in visuals])),
        grids=np.asarray([visual.grid for visual in visuals], dtype=np.int64),
        slots=torch.from_numpy(np.concatenate([s + one.slots for s, one in zip(starts, tokens, strict=False)])),
    )


def token_batches(
    lengths: Sequence[int] | np.ndarray,
    batch_tokens: int,
    max_items: int | None = None,
    counts: Sequence[bool] | None = None,
) -> list[np.ndarray]:
    """Positions grouped so that the lengths of a group add up to at most `batch_tokens` (a longer one stands alone).

    Longest first, ties in order, so the grouping is a pure function of the arguments.

    Args:
        lengths: tokens of each item.
        max_items: so many of a group at most.
        counts: the items that `max_items` is about; None: all.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    counted = np.ones(len(order), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    batches: list[np.ndarray] = []
    start, room, num_counted = 0, batch_tokens, 0
    for end, position in enumerate(order):
        room, num_counted = room - int(lengths[position]), num_counted + int(counted[position])
        if end > start and (room < 0 or (max_items is not None and num_counted > max_items)):
            batches.append(order[start:end])
            start, room, num_counted = end, batch_tokens - int(lengths[position]), int(counted[position])
    if len(order):
        batches.append(order[start:])
    return batches


def balanced(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Positions of `costs` for each of `num_parts`: in order, each to the part whose sum is smallest so far.

    With costs in falling order no part exceeds another by more than the largest of what it was given last.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0] * num_parts
    for position, cost in enumerate(costs):
        part = sums.index(min(sums))
        parts[part].append(position)
        sums[part] += cost
    return parts
