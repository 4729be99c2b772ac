"""The models that the grid trains, made on the spot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.wordnet import LAYERS

HIDDEN, BLOCKS = 1024, 2


def make_students(root: Path) -> None:
    """Untrained heads over each kind of frozen vectors, below `root`/students."""
    from b3.model.heads import write_heads

    for layer in LAYERS:
        folder = root / "students" / f"layer-{layer}"
        if not (folder / "config.json").exists():
            write_heads(folder, root / "wordnet" / f"vectors-{layer}", HIDDEN, BLOCKS)
