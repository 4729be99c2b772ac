"""Run a grid and write what it shows.

    python -m benchmarks.evidence [--grid FILE] [--questions NAME ...] [--workers N]

Everything that is not yet there is made below runs/evidence: data, students, plans, runs. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.evidence.grid import HERE, expand, read_grid
from benchmarks.evidence.run import execute_missing
from benchmarks.evidence.students import make_students
from benchmarks.evidence.wordnet import prepare

ROOT = "runs/evidence"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--questions", nargs="*", help="only these")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    os.chdir(HERE.parents[1])
    questions = expand(read_grid(arguments.grid), ROOT)
    prepare(Path(ROOT) / "wordnet")
    make_students(Path(ROOT))
    chosen = arguments.questions or list(questions)
    failed = execute_missing([run for name in chosen for run in questions[name]], arguments.workers)
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
