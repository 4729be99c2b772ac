"""Prompt rules: how the text, the instruction and the media of an item become what a backbone reads.

A rule is named by `Settings.prompt` and travels with a checkpoint. It gives the parts of a prompt in order, texts and
media; the backbone writes the media in its own tokens. With a rule come the settings that the models trained with it
expect, which apply where neither the caller nor the checkpoint says otherwise, and the way they resize images.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from b3.data.items import Item, Medium, Still
from b3.data.prompts import PLACEHOLDER, VIDEO_PLACEHOLDER
from b3.errors import DataError, InputError, gist

Parts: TypeAlias = list[str | Medium]


class PromptRule(ABC):
    """One way to write an item.

    settings: defaults for models of this rule. wraps: whether media stand between the backbone's start and end tokens.
    adds_special_tokens: whether the tokenizer's own template adds tokens. cuts_media: whether `max_length` holds for
    items with media as well. resizing: "vlm2vec", "qwen_vl_utils" or "gme", see `b3.model.backbones.qwen_vl_images`.
    """

    settings: ClassVar[dict[str, Any]] = {}
    wraps: ClassVar[bool] = False
    adds_special_tokens: ClassVar[bool] = False
    cuts_media: ClassVar[bool] = False
    resizing: ClassVar[str] = "vlm2vec"

    @abstractmethod
    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        """Texts and media in order. Raises `DataError` naming the item if it does not fit the rule."""


class Plain(PromptRule):
    """The raw text, no template: ``<|image_1|>`` or the backbone's own token stands for an image (B3, VLM2Vec V1).

    In an item without media a token stays one literal token (WebQA and EDIS queries have such).
    """

    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        if item.instruction:
            raise DataError(
                f"{item.describe()}: prompt rule 'plain' has no place for an instruction; write it into the text, or"
                " set prompt: vlm2vec"
            )
        return self._placed(item, item.text or "", image_token, video_token)

    def _placed(self, item: Item, text: str, image_token: str, video_token: str) -> Parts:
        if not item.media:
            return [text.replace(PLACEHOLDER, image_token).replace(VIDEO_PLACEHOLDER, video_token)]
        kinds: dict[str, tuple[Sequence[Medium], str]] = {
            "image": (item.images, image_token),
            "video": (item.videos, video_token),
        }
        tokens = "|".join(re.escape(token) for media, token in kinds.values() if media)
        names = "|".join(name for name, (media, _) in kinds.items() if media)
        parts: Parts = []
        used: list[Medium] = []
        end = 0
        for match in re.finditer(rf"<\|({names})_(\d+)\|>|{tokens}", text):
            name = match[1] or ("video" if match[0] == video_token and item.videos else "image")
            media = kinds[name][0]
            number = int(match[2]) if match[2] else sum(type(one) is type(media[0]) for one in used) + 1
            if not 0 < number <= len(media):
                self._refuse(item, image_token, text)
            used.append(media[number - 1])
            parts += [text[end : match.start()], media[number - 1]]
            end = match.end()
        if len(used) != len(item.media) or len({id(one) for one in used}) != len(used):
            self._refuse(item, image_token, text)
        return [*parts, text[end:]]

    def _refuse(self, item: Item, image_token: str, text: str) -> None:
        if len(item.media) == 1 and item.images:
            number = text.replace(PLACEHOLDER, image_token).count(image_token)
            raise DataError(
                f"{item.describe()}: a text with an image needs exactly one {PLACEHOLDER} or {image_token},"
                f" found {number}"
            )
        raise DataError(
            f"{item.describe()}: a text with {len(item.images)} images and {len(item.videos)} videos needs each of"
            " <|image_1|>, ..., <|video_1|>, ... exactly once"
        )


class VLM2Vec(Plain):
    """VLM2Vec V2: media, instruction and text, joined by spaces; media that the text places stay where they are."""

    settings: ClassVar[dict[str, Any]] = {"max_frames": 8}

    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        text = item.text or ""
        if any(mark in text for mark in ("<|image_", "<|video_", image_token, video_token)):
            media: Parts = self._placed(item, text, image_token, video_token)
            return [f"{item.instruction} ", *media] if item.instruction else media
        words = [word for word in (item.instruction or "", text) if word]
        parts: Parts = []
        for medium in item.media:
            parts += [medium, " "]
        return [*(parts if words else parts[:-1]), " ".join(words)]


_MARKS = re.compile(r"<\|(?:image|video)_\d+\|>\n?")


def _unmarked(item: Item) -> str:
    """The text for a rule that places media itself: without the marks of where they go, which MMEB's rows have."""
    return _MARKS.sub("", item.text or "") if item.media else item.text or ""


def _chat(system: str, *user: str | Medium) -> Parts:
    head = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    return [head, *user, "<|im_end|>\n<|im_start|>assistant\n"]


class Qwen3VLEmbedding(PromptRule):
    """The script of Qwen3-VL-Embedding (QwenLM/Qwen3-VL-Embedding at 8ce3aab): the instruction is the system message.

    Videos, images and text follow in this order; an item with nothing at all is the text ``NULL``.
    """

    settings: ClassVar[dict[str, Any]] = {
        "positions": "mrope", "min_pixels": 4096, "max_pixels": 1843200, "max_length": 8192, "max_frames": 64,
    }  # fmt: skip
    wraps: ClassVar[bool] = True
    adds_special_tokens: ClassVar[bool] = True
    cuts_media: ClassVar[bool] = True
    resizing: ClassVar[str] = "qwen_vl_utils"
    default_instruction: ClassVar[str] = "Represent the user's input."

    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        system = (item.instruction or "").strip() or self.default_instruction
        if not unicodedata.category(system[-1]).startswith("P"):
            system += "."
        media: list[Medium] = [*item.videos, *item.images]
        text = "NULL" if item.text is None and not media else _unmarked(item)
        return _chat(system, *(one for one in media if isinstance(one, Still) or one.key != "video:"), text)


class GME(PromptRule):
    """GME-Qwen2-VL: instruction as system message, images before the text, pooled at a final ``<|endoftext|>``."""

    settings: ClassVar[dict[str, Any]] = {"min_pixels": 256 * 784, "max_pixels": 1280 * 784, "max_length": 1800}
    wraps: ClassVar[bool] = True
    cuts_media: ClassVar[bool] = True
    resizing: ClassVar[str] = "gme"

    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        if item.videos:
            raise DataError(f"{item.describe()}: prompt rule 'gme' reads no videos; give an image, as the middle frame")
        system = item.instruction or "You are a helpful assistant."
        parts = _chat(system, *item.images, _unmarked(item))
        return [*parts, "<|endoftext|>"]


class B3InternVL(PromptRule):
    """B3's InternVL3 (raghavlite/B3 at 94c3b52): conversation "internvl2_5", one ``<image>``, also without an image."""

    settings: ClassVar[dict[str, Any]] = {}
    system: ClassVar[str] = (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )

    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        if item.videos or len(item.images) > 1:
            raise DataError(f"{item.describe()}: prompt rule 'b3_internvl' reads at most one image")
        text = " ".join(word for word in (item.instruction, item.text) if word).replace(PLACEHOLDER, "<image>")
        before, mark, after = text.partition("<image>")
        if not mark:
            before, after = "", f"\n{text}"
        return _chat(self.system, f"{before}<img>", *item.images, f"</img>{after}")


@dataclass(frozen=True)
class Template(PromptRule):
    """A jinja template over `text`, `instruction`, `images` and `videos`; an image or a video prints its own place."""

    source: str

    @cached_property
    def _compiled(self) -> Any:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

        class Environment(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset(["*", "**"])  # a short template could fill the memory with them

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                raise SecurityError(f"operator {operator} is not for prompts")

        try:
            return Environment(undefined=jinja2.StrictUndefined).from_string(self.source)
        except Exception as error:  # jinja computes what is constant while it compiles
            raise InputError(f"the prompt template is not valid jinja ({gist(error)})") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source}

    def parts(self, item: Item, image_token: str, video_token: str) -> Parts:
        places = {f"\ue000{i}\ue001": medium for i, medium in enumerate(item.media)}
        images = [mark for mark, medium in places.items() if isinstance(medium, Still)]
        videos = [mark for mark, medium in places.items() if not isinstance(medium, Still)]
        try:
            text = self._compiled.render(
                text=item.text or "", instruction=item.instruction or "", images=images, videos=videos
            )
        except Exception as error:  # what a template computes may raise anything
            raise DataError(f"{item.describe()}: the prompt template cannot be filled ({gist(error)})") from None
        pieces = re.split("(\ue000\\d+\ue001)", text)
        parts: Parts = [places.get(piece, piece) for piece in pieces if piece]
        if sorted(part for part in pieces if part in places) != sorted(places):
            raise DataError(f"{item.describe()}: the prompt template must print each image and video once")
        return parts


RULES = MappingProxyType[str, PromptRule](
    {
        "plain": Plain(),
        "vlm2vec": VLM2Vec(),
        "qwen3_vl_embedding": Qwen3VLEmbedding(),
        "gme": GME(),
        "b3_internvl": B3InternVL(),
    }
)


def prompt_rule(prompt: str) -> PromptRule:
    """The rule of a name, or of the text of a jinja template. Raises `InputError` listing the names."""
    if prompt in RULES:
        return RULES[prompt]
    if "{" in prompt:
        return Template(prompt)
    raise InputError(f"prompt {prompt[:60]!r} is not known; use one of {', '.join(RULES)}, or a .jinja file")


def read_prompt(prompt: str | Path) -> str:
    """What `Settings.prompt` stores: a name as it is, a file's text. Raises `InputError` if the file is missing."""
    if str(prompt).endswith(".jinja"):
        try:
            return Path(prompt).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompt template {prompt} cannot be read ({gist(error)})") from None
    return str(prompt)
