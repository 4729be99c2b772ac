"""Items to tokens, for backbones that read images: a prompt rule's parts, media tokens expanded, the longest text cut.

What differs between backbones (how a medium is resized, cut and written) is a subclass beside the backbone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from b3.data.items import Item, Medium, Still, Video
from b3.errors import DataError
from b3.model.batch import Grid, Processor, Tokens
from b3.model.prompts import PromptRule, prompt_rule
from b3.model.settings import Settings


@dataclass(frozen=True)
class MediaProcessor(Processor):
    """Turns an `Item` into `Processed` inputs. Cheap to pickle; safe in worker processes.

    Args:
        tokenizer: a fast tokenizer of the backbone.
        settings: prompt rule, budgets, longest text, positions.
    """

    tokenizer: Any
    settings: Settings = field(default_factory=Settings)
    image_token: ClassVar[str]
    video_token: ClassVar[str]  # may be the image's

    @abstractmethod
    def written(self, medium: Medium, grid: Grid) -> Iterator[tuple[str, Grid]]:
        """A medium as text, in one piece or several, each with one media token and the grid that this stands for."""

    def positions(self, length: int, spans: list[tuple[int, Grid]]) -> np.ndarray | None:
        """(3, length) int64 positions of a row with media; spans: the first token and the grid of each piece."""
        return None

    @cached_property
    def rule(self) -> PromptRule:
        return prompt_rule(self.settings.prompt)

    @cached_property
    def media_ids(self) -> np.ndarray:
        """(2,) int64: the tokens of images and of videos."""
        return np.asarray(self.tokenizer.convert_tokens_to_ids([self.image_token, self.video_token]), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        cached = {
            name for kind in type(self).__mro__ for name, v in vars(kind).items() if isinstance(v, cached_property)
        }
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def check(self, item: Item) -> None:
        self.rule.parts(item, self.image_token, self.video_token)
        for video in self.media(item):
            if isinstance(video, Video) and not video.file and not video.frames:
                raise DataError(f"{item.describe()}: a video without frames; check its folder or drop the row")

    def content(self, item: Item) -> str:
        marks = {Still: self.image_token, Video: self.video_token}
        parts = self.rule.parts(item, self.image_token, self.video_token)
        return "".join(part if isinstance(part, str) else marks[type(part)] for part in parts)

    def media(self, item: Item) -> tuple[Medium, ...]:
        parts = self.rule.parts(item, self.image_token, self.video_token)
        return tuple(part for part in parts if not isinstance(part, str))

    def tokens(self, item: Item, grids: Sequence[Grid]) -> Tokens:
        text, spans = self._write(item, list(grids))
        ids, num_added = self._tokenize(text, item)
        places = np.flatnonzero(np.isin(ids, self.media_ids))
        assert len(places) == len(spans), "media tokens are special tokens of the tokenizer, hence never merged"
        counts = np.ones(len(ids), dtype=np.int64)
        of_media = [(place, grid) for place, grid in zip(places, spans, strict=True) if grid is not None]
        for place, grid in of_media:
            counts[place] = self.num_features(grid)
        starts = np.cumsum(counts) - counts
        expanded = np.repeat(ids, counts)
        slots = [np.arange(starts[place], starts[place] + counts[place]) for place, _ in of_media]
        positions = None
        if self.settings.positions == "mrope" and of_media:
            positions = self.positions(len(expanded), [(int(starts[place]), grid) for place, grid in of_media])
        whole = Tokens(expanded, np.concatenate(slots) if slots else np.empty(0, dtype=np.int64), positions)
        return self._cut(whole, num_added, item)

    def _write(self, item: Item, grids: list[Grid]) -> tuple[str, list[Grid | None]]:
        """The text with one token for each medium (or step of a video), and the grid of each; None: a literal token."""
        text, spans = "", list[Grid | None]()
        for part in self.rule.parts(item, self.image_token, self.video_token):
            if isinstance(part, str):
                spans += [None] * sum(part.count(token) for token in {self.image_token, self.video_token})
                text += part
                continue
            for piece, grid in self.written(part, grids.pop(0)):
                spans.append(grid)
                text += piece
        return text, spans

    def _tokenize(self, text: str, item: Item) -> tuple[np.ndarray, int]:
        """(ids, how many of them the tokenizer's template added at the end)."""
        # the backend's own call: unlike the wrapper's it may run in several threads at once
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=self.rule.adds_special_tokens)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        if len(ids) == 0:
            raise DataError(f"{item.describe()}: an item needs a text or an image")
        if not self.rule.adds_special_tokens:
            return ids, 0
        of_text = np.flatnonzero(np.asarray(encoded.special_tokens_mask) == 0)
        return ids, len(ids) - 1 - int(of_text[-1])

    def _cut(self, tokens: Tokens, num_added: int, item: Item) -> Tokens:
        """At most `max_length` tokens, those that the tokenizer added at the end among them."""
        limit = self.settings.max_length
        if limit is None or len(tokens) <= limit or (len(tokens.slots) and not self.rule.cuts_media):
            return tokens
        keep = limit - num_added
        if len(tokens.slots) and tokens.slots[-1] >= keep:
            raise DataError(
                f"{item.describe()}: its media take {tokens.slots[-1] + 1} of the {limit} tokens of max_length;"
                " raise max_length, or lower max_pixels or max_frames"
            )
        rows = np.concatenate([np.arange(keep), np.arange(len(tokens) - num_added, len(tokens))])
        positions = None if tokens.positions is None else tokens.positions[:, :limit]
        return Tokens(tokens.input_ids[rows], tokens.slots, positions)
