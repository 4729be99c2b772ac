"""Do recorded numbers come out again on this machine? Some recorded runs with everything made anew, side by side.

Packages, data, students, plans and runs go below runs/evidence-repeat. A call that was interrupted goes on there; once
a table was printed the next call begins anew.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.evidence.grid import ROOT, Run
from benchmarks.evidence.results import Results, cell_of, difference
from benchmarks.evidence.tables import markdown

PLACE = Path(f"{ROOT}-repeat")
TABLE = "table.md"
LEVEL = 0.95  # of all intervals of a table together
DRAWS = 4000


@dataclass(frozen=True)
class Chosen:
    """A recorded run, its key in the recorded files, and one of the questions that it belongs to."""

    run: Run
    key: str
    question: str

    @cached_property
    def traits(self) -> tuple[object, ...]:
        """What runs that are repeated should differ in, the most important first."""
        return self.run.config().batch.mined, ("arm", dict(self.run.labels).get("arm")), self.question

    @property
    def setting(self) -> str:
        """Recipe, question and labels in a few words."""
        skipped = ("recipe", "lr_at_64", "lr_power")
        labels = [f"{axis}={value}" for axis, value in self.run.labels if axis not in skipped]
        recipe = Path(self.run.recipe).stem.removeprefix("base_")
        return f"{recipe}, {self.question}: {' '.join(labels)} seed={self.run.seed}"


def choose(
    questions: Mapping[str, Sequence[Run]], recorded: Mapping[str, object], count: int, by_question: bool
) -> list[Chosen]:
    """`count` recorded runs of each recipe, or of each question, no run twice; always the same.

    Each next one is of those whose kind (mined batches or random ones), then arm, then question was taken least, the
    one with the smallest key, which is a hash.
    """
    groups: dict[str, list[Chosen]] = {}
    for question, runs in questions.items():
        for run in runs:
            if (key := run.key) in recorded:
                groups.setdefault(question if by_question else run.recipe, []).append(Chosen(run, key, question))
    found: dict[str, Chosen] = {}
    for group in groups.values():
        taken: Counter[object] = Counter()
        for _ in range(count):
            left = [one for one in group if one.key not in found]
            if left:
                best = min(left, key=lambda one: (*(taken[trait] for trait in one.traits), one.key, one.question))
                found[best.key] = best
                taken.update(best.traits)
    return list(found.values())


def compare(chosen: Sequence[Chosen], recorded: Results, root: Path) -> tuple[str, bool]:
    """(a table of recorded scores and those below `root`, whether all agree).

    The interval is of a bootstrap over held-out queries of the paired difference, and all intervals of the table hold
    together with `LEVEL`: one run in twenty must not be outside by chance. Two runs agree whose interval has 0 in it.
    """
    body, agree = [], True
    for one in chosen:
        precision = not one.run.config().data.source.startswith("jsonl:")  # of emoji only that is recorded
        old = recorded.runs[one.key]
        before = cell_of([old], [recorded.ranks[one.key]], precision)
        file = root / "results" / f"{replace(one.run, root=str(root)).key}.npz"
        if not file.exists():
            body.append([one.setting, f"{100 * before.mean:.2f}", "failed", "", "", "no"])
            agree = False
            continue
        arrays = np.load(file)
        now = cell_of([old], [np.concatenate([arrays[name] for name in old["queries"]])], precision)
        found = difference(now, before, DRAWS, 1 - (1 - LEVEL) / len(chosen))
        mean, low, high = (round(100 * value, 2) + 0.0 for value in found)  # what does not show is no difference
        inside = low <= 0 <= high
        agree &= inside
        numbers = (f"{100 * before.mean:.2f}", f"{100 * now.mean:.2f}", f"{mean:+.2f}")
        interval = f"[{low:+.2f}, {high:+.2f}]"
        body.append([one.setting, *numbers, interval, "yes" if inside else "no"])
    head = ("setting", "recorded", "here", "difference", f"its interval ({LEVEL:.0%}, all rows together)", "0 inside")
    return markdown(head, body), agree


def begin(root: Path) -> None:
    """Empty `root` where an earlier call came to its table."""
    if (root / TABLE).exists():
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
