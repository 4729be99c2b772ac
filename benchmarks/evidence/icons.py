"""Drawings, names and tags of icons and emoji, as the packages of npm bring them.

A drawing is an SVG of one of the sets of Iconify; the sets differ in looks: one-coloured silhouettes, line drawings,
coloured pictures. A name is what a drawing shows, in words, without the style it is drawn in.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.packages import npm_package, python_package

if TYPE_CHECKING:
    from PIL import Image

SIDE = 96
SETS = {  # of npm's @iconify-json
    "game-icons": "1.2.4",
    "icon-park": "1.2.4",
    "ph": "1.2.2",
    "tabler": "1.2.41",
    "mdi": "1.2.3",
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "openmoji": "1.2.29",
    # for the start of the student alone
    "streamline-color": "1.2.2",
    "streamline-plump-color": "1.2.2",
    "streamline-freehand-color": "1.2.2",
    "streamline-ultimate-color": "1.2.2",
    "healthicons": "1.2.13",
}
TAGGED = {"mdi": ("@mdi/svg", "7.4.47"), "tabler": ("@tabler/icons", "3.52.0"), "lucide": ("lucide-static", "1.62.0")}
FONT_AWESOME = ("@fortawesome/fontawesome-free", "7.3.1")
EMOJIBASE = ("emojibase-data", "17.0.0")
RESVG = ("resvg-py", "0.5.0")
LANGUAGES = ("en", "de", "fr", "es", "it", "pt")
FLAGS = 9  # the group of flags in Unicode
_STYLE = re.compile(r" (outline|line|fill|filled|flat|duotone|bold|light|thin|negative|24px|solid|variant|round)$")
_NUMBER = re.compile(r"(?<=[a-z]) \d+$")


def readable(name: str) -> str:
    """'bell-outline' -> 'bell outline'."""
    return " ".join(re.sub(r"[-_/]", " ", name.lower()).split())


def plain_name(name: str) -> str:
    """A readable name without the words of its style and without a number at its end."""
    name = readable(name)
    while _STYLE.search(name) or _NUMBER.search(name):
        name = _NUMBER.sub("", _STYLE.sub("", name))
    return name


@dataclass(frozen=True)
class Emoji:
    """One concept: its English name, (name, tags) by language, and its icon's name in each set that draws it."""

    name: str
    texts: dict[str, tuple[str, tuple[str, ...]]]
    icons: dict[str, str]


class Icons:
    """Reads the packages below `folder`, fetching those that are missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def drawn(self, name: str) -> dict[str, str]:
        """SVG by the name of the icon, of a set of `SETS`."""
        package = npm_package(self.folder, f"@iconify-json/{name}", SETS[name])
        tree = json.loads((package / "icons.json").read_text())
        found = {}
        for icon, entry in tree["icons"].items():
            width, height = (entry.get(side, tree.get(side, 16)) for side in ("width", "height"))
            body = entry["body"].replace("currentColor", "#222222")
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
            found[icon] = f"{head}{body}</svg>"
        return found

    def tags(self, name: str) -> dict[str, list[str]]:
        """Tags by the name of the icon, of `TAGGED` or "font-awesome"."""
        if name == "font-awesome":
            tree = json.loads((npm_package(self.folder, *FONT_AWESOME) / "metadata/icon-families.json").read_text())
            return {icon: entry["search"]["terms"] for icon, entry in tree.items()}
        package = npm_package(self.folder, *TAGGED[name])
        if name == "mdi":
            return {entry["name"]: entry["aliases"] for entry in json.loads((package / "meta.json").read_text())}
        if name == "tabler":
            return {icon: e["tags"] for icon, e in json.loads((package / "icons.json").read_text()).items()}
        tags: dict[str, list[str]] = json.loads((package / "tags.json").read_text())
        return tags

    def emoji(self, sets: Sequence[str]) -> list[Emoji]:
        """Emoji without flags and skin tones that at least two of the sets draw."""
        package = npm_package(self.folder, *EMOJIBASE)
        by_language = {}
        for language in LANGUAGES:
            entries = json.loads((package / language / "compact.json").read_text())
            by_language[language] = {e["hexcode"]: e for e in entries}
        icon_of = {}
        for name in sets:
            chars = npm_package(self.folder, f"@iconify-json/{name}", SETS[name]) / "chars.json"
            icon_of[name] = {_code(code): icon for code, icon in json.loads(chars.read_text()).items()}
        found = []
        for code, entry in by_language["en"].items():
            icons = {name: icon_of[name][_code(code)] for name in sets if _code(code) in icon_of[name]}
            if len(icons) < 2 or entry.get("group", FLAGS) == FLAGS:
                continue
            texts = {
                language: (entries[code]["label"].lower(), tuple(t.lower() for t in entries[code].get("tags", ())))
                for language, entries in by_language.items()
                if code in entries
            }
            found.append(Emoji(readable(entry["label"]), texts, icons))
        return found


def _code(code: str) -> str:
    return code.lower().replace("-fe0f", "")


class Renderer:
    """Draws SVG texts, dark on white."""

    def __init__(self, folder: Path) -> None:
        place = str(python_package(folder, *RESVG))
        if place not in sys.path:
            sys.path.append(place)

    def __call__(self, svg: str) -> Image.Image | None:
        """An RGB image of `SIDE` pixels; None where the SVG cannot be drawn."""
        import resvg_py
        from PIL import Image

        try:
            data = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
        except ValueError:
            return None
        drawing = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        canvas = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255))
        canvas.alpha_composite(drawing.resize((SIDE, SIDE)) if drawing.size != (SIDE, SIDE) else drawing)
        return canvas.convert("RGB")
