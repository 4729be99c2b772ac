"""All weights of a backbone on disk, for training without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.model.checkpoint import load_backbone

if TYPE_CHECKING:
    from torch import nn

    from b3.model.embedder import Embedder


def save_full(embedder: Embedder, folder: Path) -> None:
    """Write backbone, tokenizer and image budget as a checkpoint that `Embedder.from_pretrained` and others load."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = embedder.backbone
    backbone.save_pretrained(str(folder))
    embedder.save_settings(folder)


def load_full(backbone: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint of the same shape into `backbone`, in float32.

    Raises `InputError` if the checkpoint is missing or incomplete.
    """
    import torch

    saved = load_backbone(folder, torch.float32, torch.device("cpu"), "sdpa")
    backbone.load_state_dict(saved.state_dict())
