"""Rows of the six tasks over drawings, as the emoji data has them, and held-out concepts to see how learning goes."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from PIL import Image

from dev.emoji import scenes
from dev.emoji.catalog import VENDORS, Concept, compose_caption
from dev.icons.catalog import COLOURED, EMOJI, Drawing

SEED = 505
HELD_OUT = 400
CANDIDATES = 50
SCENES, QUESTIONS, CROPS = 1800, 3, 3
PAIRS = 4  # ordered pairs of drawings of one concept, at most
IMAGE = "<|image_1|>"
IMAGE_TARGET = f"{IMAGE}\nRepresent the given image.\n"
CROP_TARGET = f"{IMAGE}\nRepresent the given cropped image of the object"
TO_TEXT = (
    "Find an image caption describing the given image.",
    "Find a text that describes the given drawing.",
    "What does this picture show?",
    "Find the caption of the given clip art.",
    "Describe the given icon.",
    "Represent the given image.",
)
TO_IMAGE = (
    "Find me an image that matches the given caption: ",
    "Find me a drawing that shows the following: ",
    "Find a picture of this: ",
    "Find an icon that matches the given text: ",
    "Retrieve the clip art described as ",
    "",
)
TO_SAME = "Find another image that shows the same thing as the provided image."
CLASS = "Represent the given image for classification"
Row = tuple[str, str, str, str]


@dataclass
class Rows:
    """train: (query, its image, target, its image) by subset. test: the same with lists of targets. images: by path."""

    train: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    test: dict[str, list[tuple[str, str, list[str], list[str]]]] = field(default_factory=lambda: defaultdict(list))
    images: dict[str, Image.Image] = field(default_factory=dict)


def build(drawings: list[Drawing], terms: dict[str, list[str]]) -> Rows:
    """All rows, a function of the drawings alone."""
    rows, rng = Rows(), random.Random(SEED)
    paths: dict[str, list[str]] = defaultdict(list)
    labels: dict[str, list[str]] = defaultdict(list)
    for number, drawing in enumerate(drawings):
        path = f"icons/{drawing.source}/{number:05d}.webp"
        rows.images[path] = drawing.flat()
        paths[drawing.name].append(path)
        if drawing.label and drawing.label not in labels[drawing.name]:
            labels[drawing.name].append(drawing.label)
    captions = {name: compose_caption(name, terms.get(name, []) + labels[name]) for name in paths}
    held = rng.sample(sorted(paths), HELD_OUT)
    _held_out(rows, held, paths, captions)
    for drawing, path in zip(drawings, rows.images, strict=True):
        if drawing.name in held:
            continue
        text = captions[drawing.name] if rng.random() < 0.7 else drawing.name
        rows.train["icons_i2t"].append((f"{IMAGE}\n{rng.choice(TO_TEXT)}\n", path, text, ""))
        text = captions[drawing.name] if rng.random() < 0.7 else drawing.name
        rows.train["icons_t2i"].append((f"{rng.choice(TO_IMAGE)}{text}\n", "", IMAGE_TARGET, path))
        if drawing.label:
            rows.train["icons_cls"].append((f"{IMAGE}\n{CLASS}\n", path, drawing.label, ""))
    for name, several in paths.items():
        pairs = [(a, b) for a in several for b in several if a != b]
        for a, b in rng.sample(pairs, min(PAIRS, len(pairs))) if name not in held else []:
            rows.train["icons_i2i"].append((f"{IMAGE}\n{TO_SAME}\n", a, IMAGE_TARGET, b))
    _scene_rows(rows, [d for d in drawings if d.name not in held], rng)
    return rows


def _held_out(rows: Rows, held: list[str], paths: dict[str, list[str]], captions: dict[str, str]) -> None:
    for name in held:
        rng = random.Random(f"{SEED}/{name}")
        others = [name, *rng.sample([n for n in held if n != name], CANDIDATES - 1)]
        images, texts = [paths[n][0] for n in others], [captions[n] for n in others]
        empty = [""] * CANDIDATES
        rows.test["icons_i2t"].append((f"{IMAGE}\n{TO_TEXT[0]}\n", images[0], texts, empty))
        rows.test["icons_t2i"].append((f"{TO_IMAGE[0]}{texts[0]}\n", "", [IMAGE_TARGET] * CANDIDATES, images))


def _scene_rows(rows: Rows, drawings: list[Drawing], rng: random.Random) -> None:
    """Questions about scenes, and names of things in them with their crops."""
    known: dict[str, list[Image.Image]] = defaultdict(list)
    pool: dict[str, Concept] = {}
    for drawing in drawings:
        if drawing.source in (*COLOURED, *EMOJI) or drawing.source in ("openclipart", "tuxpaint"):
            known[drawing.name].append(drawing.image)
            concept = Concept(drawing.name, drawing.name, drawing.name, drawing.label, drawing.label, None)
            pool.setdefault(drawing.name, concept)
    concepts = [c for c in pool.values() if c.label and len(c.name) > 2 and c.name.replace(" ", "").isalpha()]
    images = {c.path(v): known[c.code][i % len(known[c.code])] for c in concepts for i, v in enumerate(VENDORS)}
    for number in range(SCENES):
        scene = scenes.draw_scene(number, concepts, SEED)
        picture = _render(scene, images)
        rows.images[scene.path] = picture
        for question in scenes.ask(scene, concepts, SEED, QUESTIONS):
            text = question.text.replace("emoji", "things")
            query = f"{IMAGE}\nRepresent the given image with the following question: {text}\n"
            rows.train["icons_vqa"].append((query, scene.path, question.answer, ""))
        unique = scene.unique()
        for index in rng.sample(unique, min(CROPS, len(unique))):
            thing, path = scene.objects[index], scene.crop_path(index)
            rows.images[path] = picture.crop(thing.box)
            query = (
                f'{IMAGE}\nSelect the portion of the image that isolates the object labeled as "{thing.concept.name}"\n'
            )
            rows.train["icons_vg"].append((query, scene.path, CROP_TARGET, path))


def _render(scene: scenes.Scene, images: dict[str, Image.Image]) -> Image.Image:
    side = scene.grid * scenes.CELL
    canvas = Image.new("RGBA", (side, side), (*scene.background, 255))
    for placed in scene.objects:
        image = images[placed.concept.path(scene.vendor)]
        small = image.resize((placed.side, placed.side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(small, (placed.left, placed.top))
    return canvas.convert("RGB")
