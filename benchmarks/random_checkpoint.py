"""A checkpoint of a published shape with random weights, for timing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write(folder: Path, shape: Path, texts: Iterable[str], device: str = "cpu") -> None:
    """Write a Qwen2-VL of the configuration in the file `shape`, in bfloat16, its tokenizer made from `texts`."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from b3.model.backbones.tiny import make_tiny_model

    make_tiny_model(folder, texts, hidden=32, heads=4)  # its tokenizer and the files of its processor stay
    tiny = json.loads((folder / "config.json").read_text())
    facts: dict[str, Any] = json.loads(shape.read_text())
    facts |= {name: value for name, value in tiny.items() if name.endswith("_token_id")}
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**facts))
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
