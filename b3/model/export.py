"""A model as other software loads it: whole weights, adapter merged, in the layout of the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from b3.console import no_bars
from b3.files import publish, write_text
from b3.locks import alone
from b3.model.embedder import Embedder, locate

# Files of the backbone that say how it is used; copied as they are.
COMPANIONS = ("chat_template.json", "chat_template.jinja", "generation_config.json")


def export(
    name: str | Path, adapter: str | Path | None, target: Path, dtype: str = "bfloat16", **settings: Any
) -> Path:
    """Write `target`: weights in `dtype`, tokenizer, image budget, settings, modules of sentence-transformers.

    The sum with the adapter is formed in float32 and rounded once, as when it is merged on loading, so the vectors are
    those of `Embedder.from_pretrained(name, adapter)`. Runs on the CPU. What `target` held is replaced.

    Args:
        name, adapter, settings: as for `Embedder.from_pretrained`.
        dtype: "float32" or "bfloat16".
    """
    with alone(target, "export", "choose another folder", target.with_name(f".{target.name}.lock")):
        return _export(name, adapter, target, dtype, **settings)


def _export(name: str | Path, adapter: str | Path | None, target: Path, dtype: str, **settings: Any) -> Path:
    staged = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    model = Embedder.from_pretrained(name, adapter, dtype=dtype, device="cpu", attention="sdpa", **settings)
    backbone: Any = model.backbone
    if hasattr(backbone.config, "_attn_implementation"):
        backbone.config._attn_implementation = None  # how it was run here is no fact about the weights
    staged.mkdir(parents=True)
    with no_bars():
        model.save(staged)
    base, _ = locate(name, adapter)
    for companion in COMPANIONS:
        if (base / companion).is_file():
            shutil.copyfile(base / companion, staged / companion)
    write_text(staged / "README.md", card(model, target, name, adapter, dtype))
    publish(staged, target)
    return target


def card(model: Embedder, target: Path, name: str | Path, adapter: str | Path | None, dtype: str) -> str:
    """A model card: where the weights come from, how a vector is made, how it is loaded."""
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, sentence-similarity, b3]
---
# {target.resolve().name}

Weights of `{name}`{f" and `{adapter}`" if adapter else ""} in {dtype}. The vector is {model.describe()}.

```python
from b3 import Embedder

model = Embedder.from_pretrained("{target}")
```

{in_sentence_transformers(model, str(target), True)}
"""


def in_sentence_transformers(model: Embedder, folder: str, whole: bool) -> str:
    """How sentence-transformers loads a folder, and what of it no module of that library expresses, for model cards.

    whole: it holds all weights, not an adapter alone.
    """
    if whole and not model.reads_images:
        return f'In sentence-transformers: `SentenceTransformer("{folder}")`, the same vectors without b3.'
    text = (
        f'In sentence-transformers, with b3 installed: `SentenceTransformer("{folder}", trust_remote_code=True)`, the'
        " same vectors; the folder holds no code."
    )
    if not model.reads_images:
        return text
    rule, positions = model.settings.prompt.splitlines()[0][:40], model.settings.positions
    return (
        f"{text} Beyond that library's own module are the prompt rule (`{rule}`), positions `{positions}` and the"
        " resizing of images."
    )
