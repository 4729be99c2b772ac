"""A backbone of its own, all in one file: a text is the mean of learned vectors of its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from b3.data.items import Item
from b3.errors import DataError
from b3.model.batch import Batch, Processor, Tokens
from b3.model.embedder import Cost, Embedder, Kept, Tower, finish
from b3.model.settings import Settings


class Bytes(Processor):
    def check(self, item: Item) -> None:
        if not item.text:
            raise DataError(f"{item.describe()}: an item needs a text")

    def tokens(self, item: Item, grids: Any) -> Tokens:
        return Tokens.of_text(np.frombuffer((item.text or "").encode(), dtype=np.uint8).astype(np.int64))

    def save_pretrained(self, folder: str | Path) -> None:
        """Bytes need no tokenizer."""


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(256, 8)

    def save_pretrained(self, folder: str) -> None:
        save_file(self.state_dict(), f"{folder}/model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": "toy"}))


class Toy(Embedder):
    title = "the toy"

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
        table = Table()
        table.load_state_dict(load_file(folder / "model.safetensors"))
        return table.to(device).eval()

    @classmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, settings: Settings) -> Toy:
        return cls(backbone, Bytes(), settings)

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            Table().save_pretrained(str(folder))
        return folder

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def width(self) -> int:
        return 8

    def cost(self) -> Cost:
        return Cost(Tower(0, 0, layers=1, width=8, kept=Kept(1.0)))

    def describe(self) -> str:
        return "the mean of its bytes' vectors"

    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        rows: Any = self.backbone
        parts = rows.rows(batch.input_ids).split(batch.lengths)
        return finish(torch.stack([part.mean(dim=0) for part in parts]), normalize, self.settings.dim)
