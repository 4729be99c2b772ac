"""Access to tests/golden: outputs of the reference implementation (see its README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from b3.data.items import Item

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
