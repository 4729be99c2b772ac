"""Vectors on disk, keyed by everything that decides them.

A cache folder belongs to one set of facts (weights, numerics, image budget, positions, ...); its name is their digest,
so vectors of another model or flag can never be met. It holds shards of (digest of the item's content, vector), written
under a temporary name, synced and renamed; a half-written shard is never read. No pickle: safetensors and JSON.

Each vector remembers the list of items it was encoded with (its tag). What an interrupted list has left is taken up
batch by batch, so that it ends with the same bytes; what other lists have left is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import time
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
        self._known: dict[bytes, tuple[bytes, np.ndarray]] | None = None
        if distributed.rank() == 0 and not (self.folder / "manifest.json").exists():
            self._guard(lambda: write_json(self.folder / "manifest.json", facts))

    def _load(self) -> dict[bytes, tuple[bytes, np.ndarray]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        known: dict[bytes, tuple[bytes, np.ndarray]] = {}
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                tensors = load_file(shard)
            except (SafetensorError, OSError):
                continue  # damaged from outside: its items are encoded again
            rows = zip(tensors["digests"], tensors["tags"], tensors["vectors"], strict=True)
            for digest, tag, vector in rows:
                known.setdefault(digest.tobytes(), (tag.tobytes(), vector))
        return known

    def lookup(self, digests: list[bytes], tag: bytes, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two (N,) bool: items known from the list `tag`, and from other lists. Their rows of `vectors` are filled."""
        if self._known is None:
            self._known = self._load()
        own, other = np.zeros(len(digests), dtype=bool), np.zeros(len(digests), dtype=bool)
        for row, digest in enumerate(digests):
            entry = self._known.get(digest)
            if entry is not None:
                (own if entry[0] == tag else other)[row] = True
                vectors[row] = entry[1]
        return own, other

    def remember(self, digests: list[bytes], tag: bytes, vectors: np.ndarray, write: bool) -> None:
        """Keep (n, D) vectors in memory, and if asked on disk (now and then, or by `flush`)."""
        assert self._known is not None, "lookup comes before remember"
        for digest, vector in zip(digests, vectors, strict=True):
            self._known[digest] = (tag, vector)
            if write:
                self._new.append((digest, tag, vector))
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
