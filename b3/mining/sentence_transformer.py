"""Any sentence-transformers model as a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from b3.console import bar
from b3.data.items import Item
from b3.data.prompts import PLACEHOLDER
from b3.errors import DataError, RunError
from b3.model.batch import token_batches
from b3.model.encode import unique_items

BATCH_TOKENS = 8192
BATCH_ITEMS = 256
BATCH_IMAGES = 32


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
        items = list(items)
        self._check_images(items, progress or "items")
        distinct, index = unique_items(items)
        images = [i for i, item in enumerate(distinct) if item.image is not None]
        texts = [i for i, item in enumerate(distinct) if item.image is None]
        lengths = self._lengths([distinct[i].text or "" for i in texts])
        batches = [[texts[i] for i in batch.tolist()] for batch in token_batches(lengths, BATCH_TOKENS, BATCH_ITEMS)]
        for bare in (True, False):  # a batch is of one kind: images alone, or with a text
            kind = [i for i in images if bare == (not _caption(distinct[i]))]
            batches += [kind[s : s + BATCH_IMAGES] for s in range(0, len(kind), BATCH_IMAGES)]
        vectors: np.ndarray | None = None
        with bar(len(distinct), progress, "item") as shown:
            for batch in batches:
                inputs = [self._input(distinct[i]) for i in batch]
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

    def _check_images(self, items: list[Item], where: str) -> None:
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

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text, or characters if the tokenizer is none of `transformers`."""
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens") or not texts:
            return [max(1, len(text) // 4) for text in texts]
        most = getattr(self.model, "max_seq_length", None) or BATCH_TOKENS
        ids = tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        return [max(1, min(len(row), most)) for row in ids]


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
