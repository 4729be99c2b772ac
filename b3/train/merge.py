"""A trained adapter folded into its backbone and written as a checkpoint of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.config import Config
from b3.files import publish

if TYPE_CHECKING:
    import torch

MERGED = "merged"
# Files of the backbone that say how it is used; copied as they are.
COMPANIONS = ("chat_template.json", "chat_template.jinja", "generation_config.json")


def save_merged(config: Config, folder: Path, dtype: torch.dtype) -> Path:
    """Write `folder`/merged: weights in `dtype`, tokenizer and image budget, in the layout of the hub.

    The sum is formed in float32 and rounded once, as when an adapter is merged on loading, so the vectors are those of
    `Embedder.from_pretrained(base, adapter=folder)`. Runs on the CPU, beside the trained model.
    """
    from b3.console import no_bars
    from b3.model.checkpoint import fetch
    from b3.model.embedder import Embedder

    target, staged = folder / MERGED, folder / f".{MERGED}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    model = Embedder.from_pretrained(
        config.model.name,
        adapter=folder,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        attention="sdpa",
    )  # with the adapter's settings, which are those of the trained model
    backbone: Any = model.backbone
    backbone.config._attn_implementation = None  # how it was run here is no fact about the weights
    with no_bars():
        backbone.save_pretrained(str(staged))
    model.save_settings(staged)
    base = fetch(config.model.name)
    for name in COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, staged / name)
    shutil.rmtree(target, ignore_errors=True)
    publish(staged, target)
    return target
