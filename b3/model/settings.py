"""All that decides a vector beside the weights and the item: written with every checkpoint, read when it is loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from b3.distributed import is_first
from b3.errors import InputError
from b3.files import write_json
from b3.model.checkpoint import SETTINGS_FILE, read_json
from b3.model.prompts import prompt_rule, read_prompt

FORMAT = 1


TYPES = {"int": (int,), "int | None": (int, NoneType), "str": (str,), "float": (int, float)}


@dataclass(frozen=True, slots=True)
class Settings:
    """How items become vectors. The defaults are those of a checkpoint that says nothing.

    min_pixels, max_pixels: image budget in pixels, 28 * 28 per token.
    max_length: cut text-only items to this many tokens.
    positions: "1d" or "mrope".
    numerics: "clean", or "reference" to round rotary frequencies as the reference's evaluation does.
    square: resize every image to this many pixels per side first.
    pooling: "last", "mean" or "cls"; "auto": the checkpoint's own.
    prompt: name of a rule of `b3.model.prompts`, or the text of a jinja template.
    max_frames: at most so many frames of a video, spread evenly; None: all.
    fps: frames per second that are read of a video file.
    dim: cut vectors to their first so many numbers, before they are normalised; None: whole. For every backbone.
    """

    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_length: int | None = None
    positions: str = "1d"
    numerics: str = "clean"
    square: int | None = None
    pooling: str = "auto"
    prompt: str = "plain"
    max_frames: int | None = None
    fps: float = 1.0
    dim: int | None = None

    def __post_init__(self) -> None:
        check_types({field.name: getattr(self, field.name) for field in fields(self)})
        for value, known in (
            (self.positions, ("1d", "mrope")),
            (self.numerics, ("clean", "reference")),
            (self.pooling, ("auto", "last", "mean", "cls")),
        ):
            if value not in known:
                raise InputError(f"'{value}' is not known; use one of {', '.join(known)}")
        prompt_rule(self.prompt)
        for name, number in (("max_frames", self.max_frames), ("dim", self.dim)):
            if number is not None and number < 1:
                raise InputError(f"{name} {number} must be at least 1")

    def note_unused(self, names: tuple[str, ...], backbone: str) -> None:
        """Print a note on stderr for each setting beside `names` that is not at its default."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*names, "dim") and value != field.default and is_first():
                print(f"note: {field.name} {value} changes nothing for {backbone}", file=sys.stderr)

    def save(self, folder: Path, names: tuple[str, ...]) -> None:
        """Write the settings `names`, and `dim` if it is set, to b3_settings.json."""
        values = {name: getattr(self, name) for name in names if name != "dim"}
        values |= {} if self.dim is None else {"dim": self.dim}
        write_json(folder / SETTINGS_FILE, {"format": FORMAT, **values})


def check_types(values: dict[str, Any]) -> None:
    """Raise `InputError` naming a setting whose value has another type than its field of `Settings`."""
    for name, value in values.items():
        kind = str(Settings.__dataclass_fields__[name].type)
        if isinstance(value, bool) or not isinstance(value, TYPES[kind]):
            raise InputError(f"{name} {str(value)[:60]!r} is not of type {kind}; correct the setting")


def read_settings(*folders: Path | None) -> dict[str, Any]:
    """What the b3_settings.json files of `folders` say, the first one that names a setting counts.

    Raises `InputError` for a file of a newer format or with a setting that is not known.
    """
    result: dict[str, Any] = {}
    known = {field.name for field in fields(Settings)}
    for folder in folders:
        if folder is None or not (folder / SETTINGS_FILE).is_file():
            continue
        tree = read_json(folder / SETTINGS_FILE)
        number = tree.pop("format", None)
        if number != FORMAT:
            raise InputError(f"{folder / SETTINGS_FILE} has format {number}, this b3 reads {FORMAT}; update b3")
        unknown = sorted(set(tree) - known)
        if unknown:
            raise InputError(f"{folder / SETTINGS_FILE}: setting '{unknown[0]}' is not known; update b3")
        check_types(tree)
        result = {**tree, **result}
    return result


PUBLISHED = {  # what the authors of a checkpoint evaluate it with; from their repositories
    "Qwen3-VL-Embedding-2B": {"prompt": "qwen3_vl_embedding"},
    "Qwen3-VL-Embedding-8B": {"prompt": "qwen3_vl_embedding"},
    "gme-Qwen2-VL-2B-Instruct": {"prompt": "gme"},
    "gme-Qwen2-VL-7B-Instruct": {"prompt": "gme"},
    "VLM2Vec-V2.0": {"prompt": "vlm2vec"},
}


def resolve_settings(name: str | Path, given: dict[str, Any], *folders: Path | None) -> Settings:
    """The settings of a model: those given, else of the first of `folders`, else of a published checkpoint called
    `name`, else those that its prompt rule expects, else the defaults.

    Raises `InputError` as `read_settings` and `Settings`.
    """
    given = {key: read_prompt(value) if key == "prompt" else value for key, value in given.items() if value != "auto"}
    stored = read_settings(*folders)
    published = PUBLISHED.get(Path(name).name, {})
    if published and "prompt" not in given and "prompt" not in stored and is_first():
        print(f"note: {Path(name).name} is read with prompt {published['prompt']}", file=sys.stderr)
    chosen = {**published, **stored, **given}
    return Settings(**{**prompt_rule(chosen.get("prompt", "plain")).settings, **chosen})
