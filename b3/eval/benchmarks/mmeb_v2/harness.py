"""How the two public programs write an item of MMEB-V2 for a model.

"vlm2vec" (VLM2Vec, main at 6e1e1d4): the instruction is part of the text, 8 frames. Models that read raw text get their
media tokens written out; GME gets none, and of a video the middle frame.
"qwen3_vl_embedding" (Qwen3-VL-Embedding, at 8ce3aab): the instruction is the system message, candidates have none, 64
frames.
Numbers of the two are not comparable, so a result always says which one made it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from b3.data.items import Item, Medium, Still, Video
from b3.data.prompts import PLACEHOLDER, VIDEO_PLACEHOLDER
from b3.errors import InputError
from b3.model.settings import Settings, read_settings, resolve_settings

HARNESSES = ("vlm2vec", "qwen3_vl_embedding")


@dataclass(frozen=True, slots=True)
class Harness:
    """One way to write items.

    has_tokens: texts place their media (models whose prompt rule is plain text). is_chat: instruction apart.
    middle_frame: of a video only the middle one of the chosen frames, as an image.
    """

    name: str
    num_frames: int
    has_tokens: bool = False
    is_chat: bool = False
    middle_frame: bool = False
    clip_frames: int = 8

    @classmethod
    def of(cls, name: str, prompt: str) -> Harness:
        """The harness `name` for a model with the prompt rule `prompt`. Raises `InputError` if they do not fit."""
        if name not in HARNESSES:
            raise InputError(f"harness '{name}' is not known; use one of {', '.join(HARNESSES)}")
        if name == "qwen3_vl_embedding":
            if prompt in ("plain", "gme", "b3_internvl"):
                raise InputError(
                    f"--harness qwen3_vl_embedding gives instruction and media apart, which prompt rule '{prompt}' of"
                    " the model does not take; use --harness vlm2vec, or give --prompt"
                )
            return cls(name, 64, is_chat=True)
        return cls(name, 8, has_tokens=prompt in ("plain", "vlm2vec"), middle_frame=prompt == "gme")

    def query(self, instruction: str, text: str | None = None, medium: Medium | None = None) -> Item:
        """An item of a video or document task."""
        if self.is_chat:
            wording = f"{instruction[:-1]}." if instruction.endswith(":") else instruction
            return Item(text, media=() if medium is None else (medium,), instruction=wording)
        return self.written(self.joined(self.mark(medium), instruction, text or ""), medium)

    def target(self, instruction: str, medium: Medium) -> Item:
        """A candidate that is a video or a page."""
        return Item(media=(medium,)) if self.is_chat else self.query(instruction, None, medium)

    def mark(self, medium: Medium | None) -> str:
        """What stands for a medium in a text."""
        if medium is None or not self.has_tokens:
            return ""
        return PLACEHOLDER if isinstance(medium, Still) else VIDEO_PLACEHOLDER

    def joined(self, mark: str, instruction: str, text: str = "") -> str:
        """Mark, instruction and text with spaces between; without tokens the space before the text always stays."""
        if not self.has_tokens:
            return f"{instruction} {text}"
        return " ".join([*([mark] if mark else []), instruction, *([text] if text else [])])

    def written(self, text: str, medium: Medium | None) -> Item:
        """A finished text with its medium; a video without frames leaves its token as a literal one."""
        if isinstance(medium, Video) and self.middle_frame and medium.frames:
            medium = medium.frames[len(medium.frames) // 2]
        is_empty = isinstance(medium, Video) and not medium.frames and not medium.file
        return Item(text, media=() if medium is None or is_empty else (medium,))


def harness_settings(
    harness: str | None, name: str, given: dict[str, Any], *folders: Path | None
) -> tuple[str, str, Settings]:
    """(harness, prompt rule of the model, settings under which it reads the harness's items).

    The settings are those given, else of the checkpoint, else of its prompt rule. VLM2Vec's program forces its own
    budget on models that say nothing of theirs, writes plain texts out itself, and chooses the frames.

    Args:
        harness: None: Qwen's for models with its prompt rule, else VLM2Vec's. Qwen's gives a model that says nothing
            of its prompt its rule.
        name, given, folders: as in `resolve_settings`.
    """
    known = {**read_settings(*folders), **given}
    if harness == "qwen3_vl_embedding" and "prompt" not in known:
        given = {**given, "prompt": harness}  # that program knows one model, and calls its script
    own = resolve_settings(name, given, *folders)
    chosen = harness or ("qwen3_vl_embedding" if own.prompt == "qwen3_vl_embedding" else "vlm2vec")
    if chosen == "qwen3_vl_embedding":
        return chosen, own.prompt, own
    budget = {key: known.get(key, getattr(Settings(), key)) for key in ("min_pixels", "max_pixels")}
    prompt = "plain" if own.prompt == "vlm2vec" else own.prompt
    return chosen, own.prompt, replace(own, prompt=prompt, max_frames=None, **budget)
