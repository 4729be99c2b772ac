"""Pages of a small dictionary, and charts."""

from __future__ import annotations

import io
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TOPICS = {  # WordNet's lexicographer files
    5: "Animals", 6: "Things", 7: "Properties", 8: "The body", 12: "Feelings", 13: "Food", 15: "Places", 17: "Nature",
    20: "Plants", 27: "Substances",
}  # fmt: skip
PAGES_PER_TOPIC, ENTRIES_PER_PAGE = 4, 3
WIDTH, HEIGHT = 308, 392
GREYS = 4
MEASURES = (
    "Visitors", "Sales", "Rainfall", "Votes", "Harvest", "Deliveries", "Complaints", "Donations", "Meals", "Repairs",
)  # fmt: skip
PLACES = ("Ashford", "Brookdale", "Cedar Bay", "Dunmore")
COLOURS = ("#1c5d99", "#c8553d", "#3a7d44", "#b08900", "#6d4c91")


@dataclass(frozen=True)
class Entry:
    """A word and its meaning, and where they stand."""

    word: str
    meaning: str
    page: str
    topic: str


@dataclass(frozen=True)
class Chart:
    """A chart: what is measured where, and which of the things has the largest value."""

    name: str
    measure: str
    place: str
    largest: str
    smallest: str


def choose_entries(synsets: list[dict], seed: int) -> list[Entry]:
    """Single words with short meanings, a topic a document of several pages."""
    rng = random.Random(f"{seed}/entries")
    entries, seen = [], set[str]()
    for number, topic in TOPICS.items():
        pool = [
            s for s in synsets
            if s["class"] == number and s["lemmas"][0].isalpha() and s["lemmas"][0].islower()
            and 30 <= len(s["definition"]) <= 90 and s["lemmas"][0] not in s["definition"]
        ]  # fmt: skip
        rng.shuffle(pool)
        chosen = []
        for synset in pool:
            word = synset["lemmas"][0]
            if word not in seen and len(chosen) < PAGES_PER_TOPIC * ENTRIES_PER_PAGE:
                seen.add(word)
                chosen.append((word, synset["definition"]))
        for row, (word, meaning) in enumerate(sorted(chosen)):
            page = f"{topic.lower().replace(' ', '_')}_{row // ENTRIES_PER_PAGE + 1}"
            entries.append(Entry(word, meaning, page, topic))
    return entries


def draw_pages(entries: list[Entry], fonts: Path, images: dict[str, bytes]) -> list[str]:
    """Names of the pages; their PNGs are added to `images`."""
    plain, bold = ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf")
    body, head = (ImageFont.truetype(str(fonts / name), size) for name, size in ((plain, 15), (bold, 17)))
    small = ImageFont.truetype(str(fonts / plain), 11)
    names = list(dict.fromkeys(entry.page for entry in entries))
    for name in names:
        own = [entry for entry in entries if entry.page == name]
        canvas = Image.new("L", (WIDTH, HEIGHT), 255)
        draw = ImageDraw.Draw(canvas)
        draw.text((20, 14), own[0].topic, font=small, fill=90)
        draw.text((WIDTH - 30, HEIGHT - 24), name.rsplit("_", 1)[1], font=small, fill=90)
        draw.line((20, 32, WIDTH - 20, 32), fill=150)
        top = 44
        for entry in own:
            draw.text((20, top), entry.word, font=head, fill=0)
            top += 25
            for line in textwrap.wrap(entry.meaning, 33):
                draw.text((28, top), line, font=body, fill=40)
                top += 20
            top += 12
        images[f"pages/{name}.png"] = png(canvas.quantize(GREYS))
    return names


def draw_charts(things: list[str], images: dict[str, bytes], seed: int) -> list[Chart]:
    """One chart per measure and place; their PNGs are added to `images`."""
    charts = []
    for measure in MEASURES:
        for place in PLACES:
            name = f"chart_{len(charts):02d}"
            rng = random.Random(f"{seed}/{name}")
            labels = rng.sample(things, 4)
            values = rng.sample(range(8, 96, 4), 4)
            images[f"charts/{name}.png"] = png(_chart(measure, place, labels, values, len(charts)).quantize(16))
            order = np.argsort(values)
            charts.append(Chart(name, measure, place, labels[order[-1]], labels[order[0]]))
    return charts


def _chart(measure: str, place: str, labels: list[str], values: list[int], number: int) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(3.2, 2.5), dpi=112, layout="constrained")
    canvas = FigureCanvasAgg(sheet)
    axes = sheet.subplots()
    colour = COLOURS[number % len(COLOURS)]
    if number % 3 == 0:
        axes.barh(labels, values, color=colour)
    elif number % 3 == 1:
        axes.bar(labels, values, color=colour)
        axes.tick_params(axis="x", labelrotation=25)
    else:
        axes.pie(values, labels=labels, colors=COLOURS, textprops={"fontsize": 9})
    axes.tick_params(labelsize=9)
    axes.set_title(f"{measure} in {place}", fontsize=11)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
