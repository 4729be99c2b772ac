"""Texts for the report: without placeholders, shared instructions and excess length."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOKEN = re.compile(r"<\|[^|<>]*\|>")


def plain_text(text: str) -> str:
    """`text` on one line without image placeholders and other special tokens."""
    return " ".join(_TOKEN.sub(" ", text or "").split())


def shared_words(texts: Iterable[str]) -> tuple[int, int]:
    """How many words at the (start, end) all texts have in common: the instruction of the data set."""
    words = [text.split() for text in texts]
    if len(words) < 2:
        return 0, 0
    length = min(len(w) for w in words)
    first = words[0]
    start = 0
    while start < length and all(w[start] == first[start] for w in words):
        start += 1
    end = 0
    while end < length - start and all(w[-1 - end] == first[-1 - end] for w in words):
        end += 1
    return start, end


def drop_shared(text: str, shared: tuple[int, int]) -> str:
    """`text` without its first and last shared words."""
    words = text.split()
    return " ".join(words[shared[0] : len(words) - shared[1]])


def shorten(text: str, most: int) -> str:
    """At most `most` characters, cut at a word."""
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    return (cut[: cut.rfind(" ")] if " " in cut[most // 2 :] else cut).rstrip() + "…"


def percent(share: float, digits: int = 1) -> str:
    """0.2344 as "23.4 %", which does not break at the space."""
    return f"{100 * share:.{digits}f}\u00a0%"
