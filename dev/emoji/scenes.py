"""Scenes composed of several emoji, their crops, and questions about them that have exactly one right answer."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image

from dev.emoji.catalog import VENDORS, Concept

BACKGROUNDS = (
    (255, 255, 255),
    (245, 245, 245),
    (253, 246, 227),
    (232, 244, 253),
    (234, 250, 234),
    (253, 236, 240),
    (243, 236, 253),
    (236, 239, 244),
)
CELL = 56
SIZES = (44, 52)
MARGIN = 2
NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
DIRECTIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


@dataclass(frozen=True)
class Placed:
    """One emoji in a scene: grid cell and pixel box (left, top, side)."""

    concept: Concept
    column: int
    row: int
    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Crop box with a small margin."""
        right, bottom = self.left + self.side, self.top + self.side
        return self.left - MARGIN, self.top - MARGIN, right + MARGIN, bottom + MARGIN


@dataclass(frozen=True)
class Scene:
    """A square canvas of `grid` x `grid` cells."""

    number: int
    vendor: str
    grid: int
    background: tuple[int, int, int]
    objects: tuple[Placed, ...]

    @property
    def path(self) -> str:
        """Path inside the image store."""
        return f"scenes/{self.number:05d}.webp"

    def crop_path(self, index: int) -> str:
        """Path of an object's crop inside the image store."""
        return f"crops/{self.number:05d}_{index}.webp"

    @property
    def counts(self) -> Counter[str]:
        """How often each concept (by code) occurs."""
        return Counter(o.concept.code for o in self.objects)

    def unique(self) -> list[int]:
        """Numbers of the objects whose concept occurs once."""
        counts = self.counts
        return [i for i, o in enumerate(self.objects) if counts[o.concept.code] == 1]


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is "label", "number" or "truth" and says what the answer is."""

    text: str
    answer: str
    kind: str
    scene: Scene


def scene_pool(concepts: list[Concept]) -> list[Concept]:
    """Concepts that may appear in scenes: those that look like no other, and no colour swatches."""
    return [c for c in concepts if c.twins is None and c.label != "skin tone"]


def _confusable(one: Concept, other: Concept) -> bool:
    """Same class, or one name contained in the other."""
    return one.label == other.label or one.name in other.name or other.name in one.name


def draw_scene(number: int, pool: list[Concept], seed: int) -> Scene:
    """Lay out one scene: 3 or 4 emoji on a 2x2 grid, or 3 to 5 on a 3x3 grid; a third repeat one emoji."""
    rng = random.Random(f"{seed}/scene/{number}")
    grid = 2 if rng.random() < 0.5 else 3
    total = rng.choice((3, 4)) if grid == 2 else rng.choice((3, 4, 5))
    repeats = rng.choice((2, 2, 3)) if rng.random() < 0.33 else 1
    concepts: list[Concept] = []
    while len(concepts) < total - min(repeats, total - 1) + 1:
        candidate = rng.choice(pool)
        if not any(_confusable(candidate, other) for other in concepts):
            concepts.append(candidate)
    concepts += [concepts[0]] * (total - len(concepts))
    cells = rng.sample([(c, r) for r in range(grid) for c in range(grid)], total)
    objects = []
    for concept, (column, row) in sorted(zip(concepts, cells, strict=True), key=lambda pair: (pair[1][1], pair[1][0])):
        side = rng.randint(*SIZES)
        slack = CELL - side - 2 * MARGIN
        left = column * CELL + MARGIN + rng.randint(0, slack)
        top = row * CELL + MARGIN + rng.randint(0, slack)
        objects.append(Placed(concept, column, row, left, top, side))
    return Scene(number, rng.choice(VENDORS), grid, rng.choice(BACKGROUNDS), tuple(objects))


def render(scene: Scene, images: dict[str, bytes]) -> Image.Image:
    """The scene as an RGB image."""
    canvas = Image.new("RGBA", (scene.grid * CELL, scene.grid * CELL), (*scene.background, 255))
    for placed in scene.objects:
        image = Image.open(io.BytesIO(images[placed.concept.path(scene.vendor)])).convert("RGBA")
        side = (placed.side, placed.side)
        canvas.alpha_composite(image.resize(side, Image.Resampling.LANCZOS), (placed.left, placed.top))
    return canvas.convert("RGB")


def encode(image: Image.Image, quality: int) -> bytes:
    """WebP bytes."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=6)
    return stream.getvalue()


def _spatial(scene: Scene) -> list[Question]:
    questions = []
    for index in scene.unique():
        thing = scene.objects[index]
        for phrase, (dx, dy) in DIRECTIONS.items():
            line = [
                o
                for o in scene.objects
                if ((o.column - thing.column) * dx + (o.row - thing.row) * dy) > 0
                and (o.row == thing.row if dx else o.column == thing.column)
            ]
            if len(line) == 1:
                text = f"What is directly {phrase} the {thing.concept.name}?"
                questions.append(Question(text, line[0].concept.name, "label", scene))
    return questions


def _corners(scene: Scene) -> list[Question]:
    questions = []
    for phrase, (right, bottom) in CORNERS.items():
        cell = (right * (scene.grid - 1), bottom * (scene.grid - 1))
        for thing in scene.objects:
            if (thing.column, thing.row) == cell:
                text = f"What is in the {phrase} corner?"
                questions.append(Question(text, thing.concept.name, "label", scene))
    return questions


def _counts(scene: Scene, rng: random.Random) -> list[Question]:
    names = {o.concept.code: o.concept.name for o in scene.objects}
    code, count = max(sorted(scene.counts.items()), key=lambda pair: pair[1])
    if count == 1:
        code = rng.choice(sorted(names))
    total = Question("How many emoji are there?", NUMBERS[len(scene.objects)], "number", scene)
    return [Question(f"How many times is the {names[code]} shown?", NUMBERS[count], "number", scene), total]


def _presence(scene: Scene, pool: list[Concept], rng: random.Random) -> Question:
    present = {o.concept.code for o in scene.objects}
    if rng.random() < 0.5:
        name, answer = rng.choice(scene.objects).concept.name, "yes"
    else:
        near = {o.concept.label for o in scene.objects}
        others = [c for c in pool if c.code not in present and (c.label in near or rng.random() < 0.01)]
        name, answer = rng.choice(others).name, "no"
    return Question(f"Is the {name} shown?", answer, "truth", scene)


def ask(scene: Scene, pool: list[Concept], seed: int, number: int) -> list[Question]:
    """`number` different questions about a scene, mostly about positions, some about counts, few yes/no."""
    rng = random.Random(f"{seed}/questions/{scene.number}")
    groups = {
        "spatial": _spatial(scene),
        "corner": _corners(scene),
        "count": _counts(scene, rng),
        "presence": [_presence(scene, pool, rng)],
    }
    weights = {"spatial": 50, "corner": 22, "count": 20, "presence": 8}
    asked: list[Question] = []
    while len(asked) < number:
        open_kinds = [k for k, questions in groups.items() if questions]
        kind = rng.choices(open_kinds, [weights[k] for k in open_kinds])[0]
        asked.append(groups[kind].pop(rng.randrange(len(groups[kind]))))
    return asked
