"""All that decides a vector beside the weights and the item: written with every checkpoint, read when it is loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from b3.distributed import is_first
from b3.errors import InputError
from b3.files import write_json
from b3.model.checkpoint import SETTINGS_FILE, read_json

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """How items become vectors. The defaults are those of a checkpoint that says nothing.

    min_pixels, max_pixels: image budget in pixels, 28 * 28 per token.
    max_length: cut text-only items to this many tokens.
    positions: "1d" or "mrope".
    numerics: "clean", or "reference" to round rotary frequencies as the reference's evaluation does.
    square: resize every image to this many pixels per side first.
    pooling: "last", "mean" or "cls"; "auto": the checkpoint's own.
    """

    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_length: int | None = None
    positions: str = "1d"
    numerics: str = "clean"
    square: int | None = None
    pooling: str = "auto"

    def __post_init__(self) -> None:
        for value, known in (
            (self.positions, ("1d", "mrope")),
            (self.numerics, ("clean", "reference")),
            (self.pooling, ("auto", "last", "mean", "cls")),
        ):
            if value not in known:
                raise InputError(f"'{value}' is not known; use one of {', '.join(known)}")

    def note_unused(self, names: tuple[str, ...], backbone: str) -> None:
        """Print a note on stderr for each setting beside `names` that is not at its default."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in names and value != field.default and is_first():
                print(f"note: {field.name} {value} changes nothing for {backbone}", file=sys.stderr)

    def save(self, folder: Path, names: tuple[str, ...]) -> None:
        """Write the settings `names` to b3_settings.json."""
        write_json(folder / SETTINGS_FILE, {"format": FORMAT, **{name: getattr(self, name) for name in names}})


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
        result = {**tree, **result}
    return result
