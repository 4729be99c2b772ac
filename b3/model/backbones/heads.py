"""Heads over frozen vectors: a student whose frozen part has already seen every item.

Where an encoder stays frozen, each item passes it once, and what is left to train is a small network on its vectors.
Such a student takes a thousand steps in seconds, runs through the same trainer, batches and loss as a whole model, and
starts as good as its vectors: the blocks are residual and begin at zero. For trying recipes, and for adapting vectors
of a model that cannot be trained (an API's).

A folder of this kind holds config.json (``model_type: b3_heads``), model.safetensors, and keys.npy and vectors.npy or
the path of the folder that has them. `write_heads` makes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from b3.data.items import Item, item_id
from b3.errors import DataError, InputError
from b3.files import write_json
from b3.model.batch import Batch, Grid, Processor, Tokens
from b3.model.checkpoint import read_json
from b3.model.embedder import Cost, Embedder, Kept, Tower, finish, linear_weights
from b3.model.products import NARROW, use_onednn
from b3.model.settings import Settings

KEYS, VECTORS, CONFIG, WEIGHTS = "keys.npy", "vectors.npy", "config.json", "model.safetensors"


class Block(nn.Module):
    """x + W2 gelu(W1 LayerNorm(x)); W2 starts at zero, so that an untrained block changes nothing."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """Shape of the network and the folder of the vectors."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vectors: str


class HeadsNetwork(nn.Module):
    """Residual blocks, (N, D) to (N, D) float32."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(
            *(Block(config.hidden_size, config.intermediate_size) for _ in range(config.num_hidden_layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.blocks(x)
        return output

    def save_pretrained(self, folder: str) -> None:
        """Write config.json and model.safetensors; the vectors stay where they are."""
        from safetensors.torch import save_file

        config = self.config
        tree = {"model_type": "b3_heads", **{name: getattr(config, name) for name in HeadsConfig.__slots__}}
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, str(Path(folder) / WEIGHTS))
        write_json(Path(folder) / CONFIG, tree)

    @classmethod
    def load(cls, folder: Path) -> HeadsNetwork:
        """Raises `InputError` naming what is missing or does not fit."""
        from safetensors.torch import load_file

        tree = read_json(folder / CONFIG)
        try:
            heads = cls(HeadsConfig(**{name: tree[name] for name in HeadsConfig.__slots__}))
            heads.load_state_dict(load_file(str(folder / WEIGHTS)))
        except (KeyError, OSError, RuntimeError) as error:
            raise InputError(f"heads in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
        return heads


@dataclass(frozen=True)
class KeyedProcessor(Processor):
    """An item becomes the number of its vector: one token.

    Args:
        keys: (N,) int64 of the known items, sorted (`b3.data.datasets.item_id`).
    """

    keys: np.ndarray

    def check(self, item: Item) -> None:
        """Any item will do that has a vector."""

    def measure(self, item: Item) -> tuple[bytes, int]:
        return hashlib.sha256(item_id(item).to_bytes(8, "big", signed=True)).digest(), 1

    def tokens(self, item: Item, grids: Sequence[Grid]) -> Tokens:
        """One token, the number of the vector. Raises `DataError` for an item that has no vector."""
        key = item_id(item)
        row = int(np.searchsorted(self.keys, key))
        if row == len(self.keys) or self.keys[row] != key:
            raise DataError(f"{item.describe()}: no vector of it in {KEYS}; write the folder again with all items")
        return Tokens.of_text(np.asarray([row], dtype=np.int64))

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing to write: the keys lie beside the vectors."""


class Heads(Embedder):
    """Heads with the vectors that they read.

    Args:
        vectors: (N, D) float32, in the order of the processor's keys.
    """

    title = "heads over vectors"

    def __init__(
        self,
        network: HeadsNetwork,
        processor: KeyedProcessor,
        vectors: Tensor,
        settings: Settings | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, processor, settings, source)
        self.vectors: Tensor
        self.register_buffer("vectors", vectors, persistent=False)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
        network = HeadsNetwork.load(folder)
        if device.type == "cpu" and network.config.hidden_size >= NARROW:
            use_onednn(network)
        return network.to(device).eval()

    @classmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, settings: Settings) -> Heads:
        assert isinstance(backbone, HeadsNetwork)
        config = backbone.config
        place = base / config.vectors
        try:
            keys, vectors = (np.load(place / name, allow_pickle=False) for name in (KEYS, VECTORS))
        except (OSError, ValueError) as error:
            raise InputError(f"vectors of {base} cannot be read from {place}: {error}") from None
        if vectors.shape != (len(keys), config.hidden_size):
            raise InputError(
                f"{place}/{VECTORS} has shape {vectors.shape}; {len(keys)} keys and hidden_size {config.hidden_size} in"
                f" {base} need ({len(keys)}, {config.hidden_size})"
            )
        device = next(backbone.parameters()).device
        source = {"base": str(base), "adapter": None}
        rows = torch.from_numpy(vectors.astype(np.float32)).to(device)
        return cls(backbone, KeyedProcessor(keys), rows, settings, source)

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        items = [Item(text) for text in dict.fromkeys(texts)]
        vectors = np.random.default_rng(seed).standard_normal((len(items), 16), dtype=np.float32)
        write_vectors(folder, items, vectors)
        write_heads(folder, folder, hidden=32, blocks=1, seed=seed)
        return folder

    def describe(self) -> str:
        return "residual blocks over the vector of a frozen encoder, L2-normalised"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def width(self) -> int:
        return int(self.vectors.shape[1])

    def cost(self) -> Cost:
        backbone: Any = self.backbone
        size, layers = backbone.config.hidden_size, backbone.config.num_hidden_layers
        ratio = backbone.config.intermediate_size / size
        return Cost(Tower(*linear_weights(backbone), layers, size, Kept(2 + 2 * ratio)))

    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        return finish(self.backbone(self.vectors[self.placed(batch).input_ids]), normalize, self.settings.dim)


def write_vectors(folder: Path, items: Sequence[Item], vectors: np.ndarray) -> None:
    """Write keys.npy and vectors.npy, (N, D) float32 of distinct items."""
    keys = np.asarray([item_id(item) for item in items], dtype=np.int64)
    order = np.argsort(keys)
    assert len(vectors) == len(keys) == len(np.unique(keys)), "items must be distinct"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / VECTORS, vectors[order].astype(np.float32))
    np.save(folder / KEYS, keys[order])


def write_heads(folder: Path, vectors: Path, hidden: int, blocks: int, seed: int = 0) -> None:
    """Write untrained heads of `blocks` blocks of width `hidden` over the vectors in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dim = int(np.load(vectors / VECTORS, mmap_mode="r").shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = HeadsNetwork(HeadsConfig(dim, hidden, blocks, str(vectors.resolve())))
    heads.save_pretrained(str(folder))
