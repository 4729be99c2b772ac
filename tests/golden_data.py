"""Access to tests/golden: outputs of the reference implementation (see its README.md)."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from b3 import Embedder
from b3.data.items import Item
from b3.model.adapter import AdapterSpec, attach_adapter, load_trainable
from b3.model.backbones import vision_language
from b3.model.checkpoint import load_tokenizer
from b3.train.inputs import StepCollator

GOLDEN = Path(__file__).parent / "golden"


def checkpoint(folder: Path) -> Path:
    """The golden backbone and tokenizer together in `folder`, as a real checkpoint has them."""
    for part in ("tiny-qwen2vl", "tokenizer"):
        for file in (GOLDEN / part).iterdir():
            shutil.copy(file, folder / file.name)
    return folder


def cases() -> list[dict]:
    return json.loads((GOLDEN / "embed_cases.json").read_text())["cases"]


def item(case: dict) -> Item:
    return Item(case["text"], GOLDEN / "images" / case["image"] if case["image"] else None)


PAIRS = json.loads((GOLDEN / "train" / "train.json").read_text())["pairs"]


def to_item(side: list) -> Item:
    return Item(side[0], GOLDEN / "images" / side[1] if side[1] else None)


class GoldenPairs:
    """The recorded pairs as a data set; rows 8 + 2i, 9 + 2i have pair i's negatives as targets."""

    def __len__(self) -> int:
        return 24

    def query(self, row: int) -> Item:
        return to_item(PAIRS[row]["qry"])

    def target(self, row: int) -> Item:
        return to_item(PAIRS[row]["pos"] if row < 8 else PAIRS[(row - 8) // 2]["neg"][row % 2])


NEGATIVES = np.array([[8 + 2 * i, 9 + 2 * i] for i in range(8)])


def tokenizer_of(folder: Path) -> Any:
    """As `load_tokenizer`, once for a folder whose files stay what they are."""
    if not Path(folder).is_dir():
        return load_tokenizer(folder)
    states = ((file.name, file.stat()) for file in sorted(Path(folder).iterdir()))
    return _tokenizer(folder, tuple((name, state.st_size, state.st_mtime_ns) for name, state in states))


@functools.lru_cache(maxsize=3)
def _tokenizer(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Any:
    return load_tokenizer(folder)


def tokenizers_once() -> Any:
    """While it lasts, models of one folder share a tokenizer."""
    return mock.patch.object(vision_language, "load_tokenizer", tokenizer_of)


def embedder(folder: Path, kind: str, dropout: float = 0.0) -> Embedder:
    with tokenizers_once():
        model = Embedder.from_pretrained(folder, dtype="float32")
    model.backbone = attach_adapter(model.backbone, AdapterSpec(use_dora=kind == "dora", dropout=dropout))
    load_trainable(model.backbone, GOLDEN / f"adapter-{kind}")
    return model.train()


def collator(model: Embedder, chunk_tokens: int, negatives: int = 0, share: bool = True) -> StepCollator:
    hard = [NEGATIVES[:, :negatives]] if negatives else None
    return StepCollator([GoldenPairs()], model.processor, chunk_tokens, hard, share_duplicates=share)  # type: ignore[list-item]
