"""Vectors on disk, keyed by everything that decides them.

A cache folder belongs to one set of facts (weights, numerics, image budget, positions, ...); its name is their digest,
so vectors of another model or flag can never be met. It holds shards of (digest of the item's content, vector), written
under a temporary name, synced and renamed; a half-written shard is never read. No pickle: safetensors and JSON.

Memory holds the vectors of the list that is being encoded; those of earlier lists are mapped from the shards.

Each vector remembers the list of items it was encoded with (its tag). What an interrupted list has left is taken up
batch by batch, so that it ends with the same bytes; what other lists have left is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from b3 import distributed
from b3.errors import RunError
from b3.files import write_bytes, write_json

SHARD_ROWS = 4096
SHARD_SECONDS = 60.0


class EmbeddingCache:
    """Raw vectors of one model under one set of facts, below `root`.

    Args:
        root: folder of all caches.
        facts: JSON-able; everything that decides a vector beside the item's own content.
    """

    def __init__(self, root: Path, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._new: list[tuple[bytes, bytes, np.ndarray]] = []
        self._written = time.monotonic()
        self._known: dict[bytes, tuple[bytes, np.ndarray, int]] | None = None  # tag, and a row of (n, D) vectors
        self._mapped: set[Path] = set()  # shards that were looked into
        if distributed.rank() == 0 and not (self.folder / "manifest.json").exists():
            self._guard(lambda: write_json(self.folder / "manifest.json", facts))

    def _new_shards(self) -> Iterator[tuple[bytes, bytes, np.ndarray, int]]:
        """(digest, tag, memory-mapped vectors, row) of each row of the shards that were not looked into before."""
        from safetensors import SafetensorError

        for shard in sorted(set(self.folder.glob("shard-*.safetensors")) - self._mapped):
            self._mapped.add(shard)
            try:
                digests, tags, vectors = _map_shard(shard)
            except (SafetensorError, OSError):
                continue  # damaged from outside: its items are encoded again
            for row, (digest, tag) in enumerate(zip(digests, tags, strict=True)):
                yield digest.tobytes(), tag.tobytes(), vectors, row

    def settle(self) -> None:
        """Let go of the vectors that are on disk by now, whichever rank wrote them: they are mapped from there."""
        assert self._known is not None, "lookup comes before settle"
        for digest, tag, vectors, row in self._new_shards():
            if digest in self._known and self._known[digest][0] == tag:
                self._known[digest] = (tag, vectors, row)

    def lookup(self, digests: list[bytes], tag: bytes, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two (N,) bool: items known from the list `tag`, and from other lists. Their rows of `vectors` are filled."""
        if self._known is None:
            self._known = {}
            for digest, known_tag, stored, place in self._new_shards():
                self._known.setdefault(digest, (known_tag, stored, place))
        own, other = np.zeros(len(digests), dtype=bool), np.zeros(len(digests), dtype=bool)
        for row, digest in enumerate(digests):
            entry = self._known.get(digest)
            if entry is not None:
                (own if entry[0] == tag else other)[row] = True
                vectors[row] = entry[1][entry[2]]
        return own, other

    def remember(self, digests: list[bytes], tag: bytes, vectors: np.ndarray, write: bool) -> None:
        """Keep (n, D) vectors in memory until `settle`, and if asked on disk (now and then, or by `flush`)."""
        assert self._known is not None, "lookup comes before remember"
        for row, digest in enumerate(digests):
            self._known[digest] = (tag, vectors, row)
            if write:
                self._new.append((digest, tag, vectors[row]))
        if len(self._new) >= SHARD_ROWS or (self._new and time.monotonic() - self._written > SHARD_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Write what is new as a shard. Raises `RunError` if the disk refuses."""
        self._written = time.monotonic()
        if self._new:
            self._guard(self._write_shard)
            self._new = []

    def _write_shard(self) -> None:
        from safetensors.numpy import save

        digests, tags = (
            np.stack([np.frombuffer(entry[part], dtype=np.uint8) for entry in self._new]) for part in (0, 1)
        )
        data = save({"digests": digests, "tags": tags, "vectors": np.stack([vector for _, _, vector in self._new])})
        name = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
        write_bytes(self.folder / f"shard-{name}.safetensors", data)

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written ({error.strerror}); free space or choose another folder, then run the"
                " same command again"
            ) from None


def _map_shard(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 32) digests, (n, 16) tags and (n, D) float32 vectors, these memory-mapped. Raises if it is damaged."""
    from safetensors import safe_open

    with safe_open(file, "np") as shard:
        digests, tags = shard.get_tensor("digests"), shard.get_tensor("tags")
        shape = tuple(shard.get_slice("vectors").get_shape())
    with file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")  # of the header: https://github.com/huggingface/safetensors#format
        begin = json.loads(raw.read(size))["vectors"]["data_offsets"][0]
    return digests, tags, np.memmap(file, np.float32, "r", 8 + size + begin, shape)
