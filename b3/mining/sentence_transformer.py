"""Any sentence-transformers model as a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from b3.console import bar
from b3.data.digests import first_seen
from b3.data.items import Item, key_digests
from b3.data.lazy import Lazy
from b3.data.prompts import PLACEHOLDER
from b3.errors import DataError, RunError
from b3.model.batch import token_batches

BATCH_TOKENS = 8192
BATCH_ITEMS = 256
BATCH_IMAGES = 32
COUNTED_AT_ONCE = 4096
TEXT, IMAGE, BOTH = range(3)


class SentenceTransformerTeacher:
    """Encodes items with the model's own `encode`; no prompt is added, not even the model's default one.

    Args:
        name: hub name or folder.
        model: a loaded model, instead of `name` (which is then only shown).

    Raises:
        RunError: sentence-transformers is not installed, or the model cannot be loaded.
    """

    def __init__(self, name: str, model: Any = None) -> None:
        self.name = name
        self.model = _load(name) if model is None else model

    def encode(self, items: Iterable[Item], progress: str | None = None) -> np.ndarray:
        """(N, D) float32 vectors as the model gives them, each distinct item encoded once, in batches by length.

        Raises `DataError` naming the first row with an image that the model cannot read.
        """
        items = items if isinstance(items, Sequence) else list(items)
        self._check_images(items, progress or "items")
        first, index = first_seen(key_digests(items))
        distinct = Lazy(items.__getitem__, first)
        # a batch is of one kind: texts alone, images alone, or both
        kinds = np.fromiter((TEXT if i.image is None else BOTH if _caption(i) else IMAGE for i in distinct), np.int8)
        texts = np.flatnonzero(kinds == TEXT)
        lengths = self._lengths(distinct, texts)
        batches = [texts[batch] for batch in token_batches(lengths, BATCH_TOKENS, BATCH_ITEMS)]
        for kind in (np.flatnonzero(kinds == IMAGE), np.flatnonzero(kinds == BOTH)):
            batches += [kind[s : s + BATCH_IMAGES] for s in range(0, len(kind), BATCH_IMAGES)]
        vectors: np.ndarray | None = None
        with bar(len(distinct), progress, "item") as shown:
            for batch in batches:
                inputs = [self._input(distinct[i]) for i in batch.tolist()]
                rows = self.model.encode(
                    inputs, prompt="", batch_size=len(inputs), show_progress_bar=False, convert_to_numpy=True
                )
                if vectors is None:
                    vectors = np.empty((len(distinct), rows.shape[1]), dtype=np.float32)
                vectors[batch] = rows
                shown.update(len(batch))
        if vectors is None:
            raise DataError(f"{progress or 'items'}: there is nothing to encode")
        return vectors[index]

    def _check_images(self, items: Sequence[Item], where: str) -> None:
        modalities = getattr(self.model, "modalities", ["text"])
        both = "image" in modalities and self.model.supports(("image", "text"))
        for row, item in enumerate(items):
            if item.image is None:
                continue
            if "image" not in modalities:
                raise DataError(
                    f"{where}: row {row} has an image, which the text-only teacher st:{self.name} cannot read; choose"
                    " a multimodal teacher or data without images"
                )
            if not both and _caption(item):
                raise DataError(
                    f"{where}: row {row} has an image with a text, and the teacher st:{self.name} reads only one of"
                    " them at a time; choose another teacher"
                )

    def _input(self, item: Item) -> Any:
        if item.image is None:
            return item.text
        image, text = item.open_image(), _caption(item)
        return {"image": image, "text": text} if text else image

    def _lengths(self, items: Sequence[Item], rows: np.ndarray) -> np.ndarray:
        """Tokens of the texts of some items, or characters if the tokenizer is none of `transformers`."""
        tokenizer = getattr(self.model, "tokenizer", None)
        most = getattr(self.model, "max_seq_length", None) or BATCH_TOKENS
        lengths = np.empty(len(rows), dtype=np.int64)
        for start in range(0, len(rows), COUNTED_AT_ONCE):
            texts = [items[i].text or "" for i in rows[start : start + COUNTED_AT_ONCE].tolist()]
            if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
                counts = [len(text) // 4 for text in texts]
            else:
                ids = tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
                counts = [min(len(row), most) for row in ids]
            lengths[start : start + len(texts)] = np.maximum(counts, 1)
        return lengths


def _caption(item: Item) -> str:
    """The text beside an image, without the placeholder."""
    return (item.text or "").replace(PLACEHOLDER, "").strip()


def _load(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise RunError(f"teacher st:{name} needs sentence-transformers; install it: pip install 'b3[st]'") from None
    try:
        return SentenceTransformer(name)
    except Exception as error:  # the library raises many types, some from its own dependencies
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"teacher st:{name} cannot be loaded ({what}); give a hub name or a folder of a model") from None
