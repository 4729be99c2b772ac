"""Icons, clip art, stamps and emoji of other makers than those of the embedded data: names, tags, classes, drawings.

Neither flags nor the concepts that the embedded emoji data holds out are among them. A concept is a name; drawings of
several sets with one name are drawings of one concept.
"""

from __future__ import annotations

import colorsys
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import b3

SIDE = 64
# npm packages: icon sets in Iconify's JSON, and sets that bring search terms
COLOURED = {
    "icon-park": "1.2.4",
    "flat-color-icons": "1.2.3",
    "fluent-color": "1.2.21",
    "meteocons": "1.2.4",
    "streamline-color": "1.2.2",
    "streamline-flex-color": "1.2.2",
    "streamline-plump-color": "1.2.2",
    "streamline-ultimate-color": "1.2.2",
    "streamline-freehand-color": "1.2.2",
}
PLAIN = {"game-icons": "1.2.4", "mdi": "1.2.3", "healthicons": "1.2.13", "ph": "1.2.2"}
EMOJI = {"fluent-emoji-flat": "1.2.6", "emojione": "1.2.3", "streamline-emojis": "1.2.4"}
TAGGED = {
    "@fortawesome/fontawesome-free": "7.3.1",
    "@mdi/svg": "7.4.47",
    "@tabler/icons": "3.52.0",
    "lucide-static": "1.62.0",
}
DEBIAN = {"openclipart-png": "1:0.18+dfsg-19", "tuxpaint-stamps-default": "2022.06.04-1"}
MAX_WORDS = 3
MAX_EMOJI_WORDS = 5
DARK, BRIGHT = 90, 200  # mean grey of a drawing below which it needs a light ground, above which a black one
_STYLES = re.compile(r"-(outline|line|fill|filled|flat|duotone|bold|light|thin|negative|24px|solid|glyph|remix)$")
_NUMBER = re.compile(r"(?<=[a-z])[-_ ]?\d+$")
_SKIPPED = (
    "computer/icons",
    "shapes/stars",
    "games/cards",
    "flags",
    "unsorted/duplicates",
    "special/",
    "shapes/jigsaw",
)
_LIGHT = ((255, 255, 255), (245, 245, 245), (253, 246, 227), (232, 244, 253), (234, 250, 234), (253, 236, 240))


@dataclass(frozen=True)
class Drawing:
    """One drawing of a concept: its set, the concept's name, the maker's class for it ('' for none), an RGBA image."""

    source: str
    name: str
    label: str
    image: Image.Image
    ground: tuple[int, int, int]

    def flat(self) -> Image.Image:
        """The drawing on its ground."""
        canvas = Image.new("RGBA", self.image.size, (*self.ground, 255))
        canvas.alpha_composite(self.image)
        return canvas.convert("RGB")


def readable(name: str) -> str:
    """'a-cane-1' -> 'a cane'."""
    while _STYLES.search(name):
        name = _STYLES.sub("", name)
    name = _NUMBER.sub("", name.lower())
    return " ".join(name.replace("_", " ").replace("-", " ").replace("/", " ").split())


def npm_folder(packages: Path, name: str, version: str) -> Path:
    """Folder of an unpacked npm package: its file name without `.tgz`."""
    folder = packages / f"{name.lstrip('@').replace('/', '-')}-{version}"
    if not (folder / "package.json").is_file():
        raise SystemExit(f"{folder} is missing: npm pack {name}@{version}, then unpack it there (--strip-components=1)")
    return folder


def search_terms(packages: Path) -> dict[str, list[str]]:
    """Tags of each name over all sets that bring some, in the order met, without numbers."""
    folders = {name: npm_folder(packages, name, version) for name, version in TAGGED.items()}
    found: dict[str, list[str]] = {}

    def add(name: str, tags: list[str]) -> None:
        known = found.setdefault(readable(name), [])
        for tag in tags:
            tag = tag.lower().replace("-", " ").strip()
            if len(tag) > 1 and not tag.isdigit() and tag not in known:
                known.append(tag)

    families = json.loads((folders["@fortawesome/fontawesome-free"] / "metadata" / "icon-families.json").read_text())
    for name, entry in families.items():
        add(name, entry["search"]["terms"])
    for name, tags in json.loads((folders["lucide-static"] / "tags.json").read_text()).items():
        add(name, tags)
    for entry in json.loads((folders["@mdi/svg"] / "meta.json").read_text()):
        add(entry["name"], entry["aliases"])
    for name, entry in json.loads((folders["@tabler/icons"] / "icons.json").read_text()).items():
        add(name, [str(tag) for tag in entry["tags"]])
    return found


def _render(svg: str) -> Image.Image:
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def _ground(image: Image.Image, rng: random.Random) -> tuple[int, int, int]:
    """Light where the drawing is dark, else black or light: the transparent parts of emoji are black to the model."""
    alpha = np.asarray(image.getchannel("A"), dtype=np.float64)
    grey = float((np.asarray(image.convert("L")) * alpha).sum() / max(alpha.sum(), 1.0))
    return rng.choice(_LIGHT) if grey < DARK or (grey < BRIGHT and rng.random() < 0.4) else (0, 0, 0)


def _colour(rng: random.Random, bright: bool) -> str:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.choice((0.0, 0.5, 0.9)), 1.0 if bright else 0.4)
    return f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}"


def held_out_words() -> list[set[str]]:
    """The words of each name that the embedded emoji data keeps for its tests."""
    import pyarrow.parquet as pq

    file = Path(b3.__file__).parent / "data" / "emoji" / "test" / "emoji_i2t.parquet"
    names = {targets[0].split(": ")[0] for targets in pq.read_table(file)["tgt_text"].to_pylist()}
    return [_words(name) for name in sorted(names)]


def _words(name: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z0-9#]+", name.lower())} - {"with", "of", "and", "the", "a"}


def is_emoji_to_leave_out(name: str, held: list[set[str]]) -> bool:
    """Whether an emoji's name is a flag's, one of a skin tone, or shares half of its words with a held-out one."""
    words = _words(name)
    if not words or words & {"flag", "tone", "skin"} or name.split()[-1] in ("light", "medium", "dark"):
        return True
    return any(2 * len(words & other) >= len(words | other) for other in held)


def _icons(packages: Path, name: str, version: str, plain: bool, most: int = MAX_WORDS) -> Iterator[Drawing]:
    """Drawings of an Iconify set; one-coloured ones get a colour. One style of each name."""
    folder = npm_folder(packages, f"@iconify-json/{name}", version)
    tree = json.loads((folder / "icons.json").read_text())
    metadata = json.loads((folder / "metadata.json").read_text())
    label_of = {icon: label for label, icons in metadata.get("categories", {}).items() for icon in icons}
    chosen: dict[str, str] = {}
    for icon in tree["icons"]:  # the fullest style: fill before plain before outlines
        known = chosen.get(readable(icon))
        if known is None or icon.endswith(("-fill", "-48")):
            chosen[readable(icon)] = icon
    for text, icon in chosen.items():
        if len(text.split()) > most - plain:  # the rest is mostly one icon with another's badge
            continue
        entry, rng = tree["icons"][icon], random.Random(f"{name}/{icon}")
        width, height = (entry.get(side, tree.get(side, 16)) for side in ("width", "height"))
        body = entry["body"].replace("currentColor", _colour(rng, bright=rng.random() < 0.6))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
        try:
            image = _render(svg)
        except ValueError:
            continue
        label = readable(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label_of.get(icon, "")))
        yield Drawing(name, text, label, image, _ground(image, rng))


def _pictures(root: Path, source: str) -> Iterator[Drawing]:
    """PNG files below a folder, named and classed by their paths, on black or light ground."""
    for file in sorted(root.rglob("*.png")):
        place = file.relative_to(root).as_posix()
        if any(part in place for part in _SKIPPED):
            continue
        with Image.open(file) as opened:
            if opened.width * opened.height > 40_000_000 or min(opened.size) < 16:
                continue
            author = str(opened.info.get("Author", "")).lower().split()
            image = opened.convert("RGBA")
        image = image.crop(image.getchannel("A").getbbox() or (0, 0, *image.size))
        scale = SIDE / max(image.size)
        image = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BOX)
        square = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
        square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
        words = readable(re.sub(r"([_-][a-z]{1,2})?[_-]?0*\d*_?$", "", file.stem.lower()) or file.stem).split()
        while len(words) > 1 and any(part.startswith(words[-1]) for part in author):
            words.pop()  # file names end in the author's, cut short
        name = " ".join(words)
        caption = file.with_suffix(".txt")
        if caption.exists():
            name = caption.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip(" .").lower()[:60]
        label = readable(" ".join(file.relative_to(root).parts[:-1][-2:]))
        yield Drawing(source, name, label, square, _ground(square, random.Random(f"{source}/{place}")))


def drawings(packages: Path) -> Iterator[Drawing]:
    """All drawings, set after set, in a fixed order."""
    Image.MAX_IMAGE_PIXELS = None
    for name, version in COLOURED.items():
        yield from _icons(packages, name, version, plain=False)
    for name, version in PLAIN.items():
        yield from _icons(packages, name, version, plain=True)
    yield from _pictures(packages / "openclipart-png" / "usr/share/openclipart/png", "openclipart")
    yield from _pictures(packages / "tuxpaint-stamps-default" / "usr/share/tuxpaint/stamps", "tuxpaint")
    held = held_out_words()
    for name, version in EMOJI.items():
        emoji = _icons(packages, name, version, plain=False, most=MAX_EMOJI_WORDS)
        yield from (drawing for drawing in emoji if not is_emoji_to_leave_out(drawing.name, held))
