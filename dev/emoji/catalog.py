"""The emoji themselves: names, captions, class labels, images, look-alikes and the held-out split."""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VENDORS = ("google", "twitter")
PACKAGES = {
    "emoji-datasource": "16.0.0",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "emojibase-data": "17.0.0",
}
MAX_TAGS = 8
HELD_OUT = 250
TWIN_DISTANCE = 4.0
CLASS_NAMES = {
    "alphanum": "letter or number button",
    "av-symbol": "audio or video symbol",
    "emotion": "emotion symbol",
    "event": "festive event",
    "flag": "special flag",
    "food-asian": "asian food",
    "game": "game or toy",
    "geometric": "geometric shape",
    "hand-prop": "hand with a prop",
    "other-object": "miscellaneous object",
    "other-symbol": "miscellaneous symbol",
    "place-other": "miscellaneous place",
    "plant-other": "miscellaneous plant",
    "time": "clock or time",
}


@dataclass(frozen=True)
class Concept:
    """One base emoji. `twins` is the number of its look-alike group, None when it looks like no other."""

    code: str
    name: str
    caption: str
    category: str
    label: str
    twins: int | None

    def path(self, vendor: str) -> str:
        """Path of the image inside the image store."""
        return f"{vendor}/{self.code}.png"


def package_dir(packages: Path, name: str) -> Path:
    """Folder of an unpacked package: `NAME-VERSION`, `NAME`, or either with npm's inner `package` folder."""
    for folder in (packages / f"{name}-{PACKAGES[name]}", packages / name):
        for candidate in (folder, folder / "package"):
            if (candidate / "package.json").is_file():
                version = json.loads((candidate / "package.json").read_text())["version"]
                if version != PACKAGES[name]:
                    raise SystemExit(f"{candidate}: version {version}, expected {PACKAGES[name]}")
                return candidate
    raise SystemExit(f"{packages}: no folder {name}-{PACKAGES[name]} or {name} with a package.json")


def readable_name(label: str) -> str:
    """A label that reads well inside a question: 'flag: Qatar' -> 'flag of Qatar'."""
    head, colon, tail = label.partition(": ")
    if not colon:
        return label
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if tail == "facing right":
        return f"{head} {tail}"
    if tail == "bald":
        return f"bald {head}"
    if head in ("person", "man", "woman"):
        return f"{head} with {tail}"
    return f"{head} ({tail})"


def readable_class(subcategory: str) -> str:
    """A class label in words: 'face-smiling' -> 'face smiling'."""
    return CLASS_NAMES.get(subcategory, subcategory.replace("-", " ").replace("&", "and"))


def compose_caption(name: str, tags: list[str]) -> str:
    """'name: tag, tag' without the tags whose words are all in the name already."""
    words = set(name.lower().replace(",", " ").split())
    new_tags = [t for t in tags if not set(t.lower().split()) <= words][:MAX_TAGS]
    return f"{name}: {', '.join(new_tags)}" if new_tags else name


def read_images(packages: Path) -> dict[str, bytes]:
    """Original PNG bytes of every base emoji that both vendors draw, by path in the image store."""
    images: dict[str, bytes] = {}
    entries = json.loads((package_dir(packages, "emoji-datasource") / "emoji.json").read_text())
    for entry in sorted(entries, key=lambda e: e["image"]):
        if all(entry[f"has_img_{v}"] for v in VENDORS):
            for vendor in VENDORS:
                folder = package_dir(packages, f"emoji-datasource-{vendor}")
                images[f"{vendor}/{entry['image']}"] = (folder / "img" / vendor / "64" / entry["image"]).read_bytes()
    return images


def _plain(code: str) -> str:
    return code.upper().replace("-FE0F", "")


def read_concepts(packages: Path, images: dict[str, bytes]) -> list[Concept]:
    """All concepts, sorted by code; checks that names and captions are distinct."""
    english = json.loads((package_dir(packages, "emojibase-data") / "en" / "data.json").read_text())
    named = {_plain(e["hexcode"]): e for e in english}
    datasource = json.loads((package_dir(packages, "emoji-datasource") / "emoji.json").read_text())
    entries = [e for e in sorted(datasource, key=lambda e: e["image"]) if f"google/{e['image']}" in images]
    twins = find_twins([e["image"].removesuffix(".png") for e in entries], images)
    concepts = []
    for entry in entries:
        code = entry["image"].removesuffix(".png")
        source = named[_plain(entry["unified"])]
        name = readable_name(source["label"])
        caption = compose_caption(name, source.get("tags", []))
        label = readable_class(entry["subcategory"])
        concepts.append(Concept(code, name, caption, entry["category"], label, twins.get(code)))
    for field in ("code", "name", "caption"):
        values = [getattr(c, field) for c in concepts]
        if len(set(values)) != len(values):
            raise SystemExit(f"two concepts share a {field}")
    return concepts


def thumbnail(data: bytes) -> np.ndarray:
    """16x16 RGB thumbnail on mid grey, flattened; for comparing looks."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
    ground.alpha_composite(image)
    return np.asarray(ground.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()


def find_twins(codes: list[str], images: dict[str, bytes]) -> dict[str, int]:
    """Group number of each code that looks (nearly) like another one of the same vendor."""
    parent = {code: code for code in codes}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    for vendor in VENDORS:
        looks = np.stack([thumbnail(images[f"{vendor}/{code}.png"]) for code in codes])
        for i in range(len(codes)):
            distance = np.abs(looks[i + 1 :] - looks[i]).mean(axis=1)
            for j in np.flatnonzero(distance < TWIN_DISTANCE):
                parent[root(codes[i + 1 + int(j)])] = root(codes[i])
    members: dict[str, list[str]] = defaultdict(list)
    for code in codes:
        members[root(code)].append(code)
    groups = [group for group in members.values() if len(group) > 1]
    return {code: number for number, group in enumerate(groups) for code in group}


def split_concepts(concepts: list[Concept], seed: int) -> tuple[list[Concept], list[Concept]]:
    """(train, held out): about 13 % of every class by largest remainder; look-alikes and tiny classes stay in train."""
    classes: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        classes[concept.label].append(concept)
    share = HELD_OUT / len(concepts)
    free = {k: [c for c in v if c.twins is None] for k, v in classes.items()}
    quota = {k: share * len(v) if len(v) >= 3 else 0.0 for k, v in classes.items()}
    counts = {k: min(int(q), len(free[k])) for k, q in quota.items()}
    while sum(counts.values()) < HELD_OUT:
        open_classes = [k for k in sorted(counts) if quota[k] and counts[k] < min(len(free[k]), len(classes[k]) // 2)]
        neediest = max(open_classes, key=lambda k: (quota[k] - counts[k], k))
        counts[neediest] += 1
    held: set[str] = set()
    for label in sorted(counts):
        held.update(c.code for c in random.Random(f"{seed}/split/{label}").sample(free[label], counts[label]))
    return [c for c in concepts if c.code not in held], [c for c in concepts if c.code in held]
