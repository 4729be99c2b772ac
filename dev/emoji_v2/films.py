"""Films of one emoji that moves or changes, and tasks about them."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

from PIL import Image

SIDE, SPRITE, FRAMES = 84, 36, 8
QUALITY = 80
GROUNDS = ((255, 255, 255), (253, 246, 227), (232, 244, 253), (234, 250, 234), (253, 236, 240), (236, 239, 244))
MOTIONS = {
    "moves to the right": "moves to the left",
    "moves to the left": "moves to the right",
    "moves up": "moves down",
    "moves down": "moves up",
    "grows": "shrinks",
    "shrinks": "grows",
    "turns clockwise": "turns counterclockwise",
    "turns counterclockwise": "turns clockwise",
    "fades away": "appears",
    "appears": "fades away",
    "runs in a circle": "jumps",
    "jumps": "runs in a circle",
}  # each with the one that is hardest to tell from it
PER_THING = 3


@dataclass(frozen=True)
class Film:
    """One emoji (`thing`, its name) and what it does; `frames` are paths in the image store."""

    name: str
    thing: str
    motion: str
    frames: tuple[str, ...]

    @property
    def caption(self) -> str:
        return f"the {self.thing} {self.motion}"


def draw_films(things: dict[str, bytes], images: dict[str, bytes], seed: int) -> list[Film]:
    """`PER_THING` films of each thing, all motions equally often; frames are added to `images`."""
    films = []
    motions = list(MOTIONS)
    for number, (thing, content) in enumerate(things.items()):
        sprite = Image.open(io.BytesIO(content)).convert("RGBA").resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        first = motions[(2 * number) % len(motions)]
        others = [m for m in motions if m not in (first, MOTIONS[first])]
        third = others[(5 * number) % len(others)]
        for motion in (first, MOTIONS[first], third)[:PER_THING]:
            name = f"film_{len(films):03d}"
            ground = GROUNDS[random.Random(f"{seed}/{name}").randrange(len(GROUNDS))]
            paths = []
            for step in range(FRAMES):
                path = f"films/{name}/{step:02d}.webp"
                stream = io.BytesIO()
                frame(sprite, ground, motion, step / (FRAMES - 1)).save(stream, "WEBP", quality=QUALITY, method=6)
                images[path] = stream.getvalue()
                paths.append(path)
            films.append(Film(name, thing, motion, tuple(paths)))
    return films


def frame(sprite: Image.Image, ground: tuple[int, int, int], motion: str, time: float) -> Image.Image:
    """One frame at `time` from 0 to 1."""
    reach, middle = SIDE - SPRITE, (SIDE - SPRITE) // 2
    x = y = middle
    image = sprite
    if motion in ("moves to the right", "moves to the left"):
        x = round(reach * (time if motion.endswith("right") else 1 - time))
    elif motion in ("moves up", "moves down"):
        y = round(reach * (time if motion.endswith("down") else 1 - time))
    elif motion in ("grows", "shrinks"):
        share = 0.3 + 0.7 * (time if motion == "grows" else 1 - time)
        side = round(1.6 * SPRITE * share)
        image, x = sprite.resize((side, side), Image.Resampling.LANCZOS), (SIDE - side) // 2
        y = x
    elif motion.startswith("turns"):
        sign = -1 if motion == "turns clockwise" else 1
        image = sprite.rotate(sign * 180 * time, Image.Resampling.BICUBIC)
    elif motion in ("fades away", "appears"):
        share = time if motion == "appears" else 1 - time
        image = sprite.copy()
        image.putalpha(sprite.getchannel("A").point(lambda value: round(value * share)))
    elif motion == "runs in a circle":
        x = round(middle + middle * math.cos(2 * math.pi * time))
        y = round(middle + middle * math.sin(2 * math.pi * time))
    else:  # jumps
        y = round(reach - reach * abs(math.sin(2 * math.pi * time)))
    canvas = Image.new("RGBA", (SIDE, SIDE), (*ground, 255))
    canvas.alpha_composite(image, (x, y))
    return canvas.convert("RGB")
