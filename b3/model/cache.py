"""Vectors on disk, keyed by everything that decides them.

A cache folder belongs to one set of facts (weights, numerics, image budget, positions, ...); its name is their digest,
so vectors of another model or flag can never be met. It holds shards of (digest of the item's content, vector), written
under a temporary name, synced and renamed; a half-written shard is never read. No pickle: safetensors and JSON.

Memory holds a digest and a tag of each vector (48 bytes). The vectors themselves are mapped from the shards, but for
those that another rank has on a disk of its own, and those that are not written yet.

Each vector remembers the list of items it was encoded with (its tag). What an interrupted list has left is taken up
batch by batch, so that it ends with the same bytes; what other lists have left is taken as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from b3 import distributed
from b3.errors import RunError
from b3.files import write_bytes, write_json

SHARD_ROWS = 4096
SHARD_SECONDS = 60.0


@dataclass(frozen=True)
class _Block:
    """Some vectors: (n, 32) uint8 digests, (n, 16) uint8 tags, (n, D) float32, these in memory or mapped."""

    digests: np.ndarray
    tags: np.ndarray
    vectors: np.ndarray

    def take(self, rows: np.ndarray) -> _Block:
        return _Block(self.digests[rows], self.tags[rows], self.vectors[rows])


class EmbeddingCache:
    """Raw vectors of one model under one set of facts, below `root`.

    Args:
        root: folder of all caches.
        facts: JSON-able; everything that decides a vector beside the item's own content.
    """

    def __init__(self, root: Path, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._new: list[_Block] = []  # to be written
        self._written = time.monotonic()
        self._mapped: dict[Path, _Block | None] = {}  # shards that were looked into; None: damaged
        self._held: list[_Block] = []  # of other ranks, not seen on disk
        if distributed.rank() == 0 and not (self.folder / "manifest.json").exists():
            self._guard(lambda: write_json(self.folder / "manifest.json", facts))

    def _map_new_shards(self) -> None:
        from safetensors import SafetensorError

        for shard in sorted(set(self.folder.glob("shard-*.safetensors")) - set(self._mapped)):
            self._mapped[shard] = None
            # what is damaged from outside is encoded again
            with contextlib.suppress(SafetensorError, OSError):
                self._mapped[shard] = _map_shard(shard)

    def _blocks(self) -> list[_Block]:
        """All vectors that are known; where an item has several, the last counts."""
        return [*(block for block in self._mapped.values() if block is not None), *self._held]

    def settle(self) -> None:
        """Let go of the vectors that are on disk by now, whichever rank wrote them: they are mapped from there."""
        self._map_new_shards()
        held, self._held = self._held, []
        for block in held:
            tags = np.zeros_like(block.tags)
            for rows, stored, places in self._found(block.digests):
                tags[rows] = stored.tags[places]
            missing = np.flatnonzero((tags != block.tags).any(axis=1))
            if len(missing):
                self._held.append(block.take(missing))

    def _found(self, digests: np.ndarray) -> Iterator[tuple[np.ndarray, _Block, np.ndarray]]:
        """(rows of `digests`, a block, the places there) of all that is known; digests (N, 32) uint8 differ."""
        if not len(digests):
            return
        words = _first_words(digests)
        order = np.argsort(words)
        words = words[order]
        for block in self._blocks():
            wanted = _first_words(block.digests)
            places = np.searchsorted(words, wanted).clip(max=len(words) - 1)
            hits = np.flatnonzero(words[places] == wanted)
            rows = order[places[hits]]
            is_same = (digests[rows] == block.digests[hits]).all(axis=1)
            yield rows[is_same], block, hits[is_same]

    def lookup(self, digests: np.ndarray, tag: bytes, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two (N,) bool: items known from the list `tag`, and from other lists. Their rows of `vectors` are filled.

        digests: (N, 32) uint8, no two equal.
        """
        self._map_new_shards()
        own, known = np.zeros(len(digests), dtype=bool), np.zeros(len(digests), dtype=bool)
        for rows, block, places in self._found(digests):
            known[rows] = True
            own[rows] = (block.tags[places] == np.frombuffer(tag, dtype=np.uint8)).all(axis=1)
            vectors[rows] = block.vectors[places]
        return own, known & ~own

    def remember(self, digests: np.ndarray, tag: bytes, vectors: np.ndarray, write: bool) -> None:
        """Keep (n, D) vectors of digests (n, 32): on disk, now and then or by `flush`, or in memory until `settle`."""
        if not len(digests):
            return
        block = _Block(digests, np.tile(np.frombuffer(tag, dtype=np.uint8), (len(digests), 1)), vectors)
        (self._new if write else self._held).append(block)
        num_new = sum(len(new.digests) for new in self._new)
        if num_new >= SHARD_ROWS or (num_new and time.monotonic() - self._written > SHARD_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Write what is new as a shard. Raises `RunError` if the disk refuses."""
        self._written = time.monotonic()
        if self._new:
            self._guard(self._write_shard)
            self._new = []

    def _write_shard(self) -> None:
        from safetensors.numpy import save

        names = [field.name for field in fields(_Block)]
        arrays = {name: np.concatenate([getattr(block, name) for block in self._new]) for name in names}
        name = hashlib.sha256(arrays["digests"].data).hexdigest()[:16]
        write_bytes(self.folder / f"shard-{name}.safetensors", save(arrays))

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written ({error.strerror}); free space or choose another folder, then run the"
                " same command again"
            ) from None


def _first_words(digests: np.ndarray) -> np.ndarray:
    """(N,) uint64, the first eight bytes of each digest."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]


def _map_shard(file: Path) -> _Block:
    """The vectors of a shard, mapped. Raises if it is damaged."""
    from safetensors import safe_open

    with safe_open(file, "np") as shard:
        digests, tags = shard.get_tensor("digests"), shard.get_tensor("tags")
        shape = tuple(shard.get_slice("vectors").get_shape())
    with file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")  # of the header: https://github.com/huggingface/safetensors#format
        begin = json.loads(raw.read(size))["vectors"]["data_offsets"][0]
    return _Block(digests, tags, np.memmap(file, np.float32, "r", 8 + size + begin, shape))
