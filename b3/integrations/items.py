"""Inputs of other libraries as items: what a model here expects of a text, an image, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from b3.data.items import Item, as_item
from b3.data.prompts import PLACEHOLDER
from b3.model.embedder import Embedder
from b3.model.prompts import Plain


def as_read(embedder: Embedder, value: Any, prompt: str = "") -> Item:
    """An input (an image, or what `as_item` takes) as the prompt rule of a model reads it.

    Under the rule `plain` an image without a place in its text goes first, and `prompt` before the text (behind an
    image that stands first); under another rule `prompt` is the instruction. Raises `DataError` as `as_item`.
    """
    if hasattr(value, "convert") or isinstance(value, (bytes, Path)):  # an image
        value = {"image": value}
    item = as_item(value)
    processor: Any = embedder.processor
    if has_place_for_instructions(embedder):
        return Item(item.text, media=item.media, instruction=item.instruction or prompt or None)
    text, head = item.text or "", f"{PLACEHOLDER}\n"
    if len(item.media) == 1 and item.images and PLACEHOLDER not in text and processor.image_token not in text:
        text = head + text
    start = head if text.startswith(head) else ""
    return Item(start + prompt + text[len(start) :], media=item.media, instruction=item.instruction)


def has_place_for_instructions(embedder: Embedder) -> bool:
    """Whether the model's prompt rule gives instructions a place; raw texts have none."""
    rule = getattr(embedder.processor, "rule", None)
    return rule is not None and type(rule) is not Plain
