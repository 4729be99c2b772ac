"""Is a result reproduced: scores of an evaluation against published ones, subset by subset, and a plain verdict.

    python -m b3.eval.compare runs/b3/eval --against published --model B3_Qwen2_2B
    python -m b3.eval.compare runs/b3/eval --against runs/other/eval

Exit code 0: reproduced. 3: not. 2: the two cannot be compared. --kind checkpoint (the same weights, here and there)
asks for less difference than --kind training (the same recipe, trained again), where better scores are no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from b3 import registry
from b3.errors import InputError, command
from b3.eval.benchmark import Benchmark
from b3.eval.benchmarks.mmeb_marks import MARKS, Marks
from b3.eval.report import mean

NOT_REPRODUCED = 3
WITHIN, BELOW, ABOVE = "within", "below", "above"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a score may lie from a published one, in points (0 to 100).

    outside: share of the subsets that may lie further away.

    Of a checkpoint: two versions of the score files that VLM2Vec's project published differ by up to 1.0 per subset for
    its own models (`mmeb_scores.csv`); the other two are choices of ours. Of a training: two runs whose answers differ
    on half of 1,000 rows are 3 points apart now and then; groups and means may lie as far apart as the paper's
    ablations of one recipe. Nobody has published seeds.
    """

    subset: float
    group: float
    overall: float
    outside: float
    above_counts: bool


KINDS = {
    "checkpoint": Tolerance(1.0, 0.7, 0.4, 0.05, True),
    "training": Tolerance(3.0, 1.5, 0.5, 0.10, False),
}


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the comparison; scores in points. is_counted: whether it bears on the verdict."""

    name: str
    ours: float
    theirs: float
    tolerance: float
    verdict: str
    is_counted: bool = True

    @property
    def difference(self) -> float:
        return self.ours - self.theirs


@dataclass(frozen=True, slots=True)
class Comparison:
    """All lines, and what follows from them. why_not: what speaks against; empty: reproduced."""

    subsets: list[Line]
    means: list[Line]
    missing: list[str]
    why_not: list[str]

    @property
    def verdict(self) -> str:
        counted = [line for line in self.subsets if line.is_counted]
        if not self.why_not:
            rest = f"; {len(self.missing)} subsets of theirs were not scored" if self.missing else ""
            return f"reproduced: {len(counted)} subsets compared{rest}"
        return f"not reproduced: {'; '.join(self.why_not)}"


def compare(ours: dict[str, float], theirs: Marks, benchmark: Benchmark, tolerance: Tolerance) -> Comparison:
    """Compare scores (0 to 1) by subset; means only where all of their subsets were scored.

    Raises `InputError` if the two have no subset in common and no mean can be compared.
    """

    def line(name: str, a: float, b: float, allowed: float, is_counted: bool = True) -> Line:
        gap = round(100 * (a - b), 6)
        verdict = WITHIN if abs(gap) <= allowed else ABOVE if gap > 0 else BELOW
        return Line(name, 100 * a, 100 * b, allowed, verdict, is_counted)

    shared = [name for name in benchmark.names if name in ours and name in theirs.subsets]
    subsets = [
        line(name, ours[name], theirs.subsets[name], tolerance.subset, name not in theirs.doubtful) for name in shared
    ]
    members = {**benchmark.families(benchmark.names), **benchmark.domains(benchmark.names), "mean": benchmark.names}
    scored = {group: names for group, names in members.items() if all(name in ours for name in names)}
    published = {
        group: mean([theirs.subsets[n] for n in names])
        for group, names in scored.items()
        if all(n in theirs.subsets for n in names)
    } | theirs.means
    means = [
        line(group, mean([ours[n] for n in names]), published[group],
             tolerance.overall if group == "mean" else tolerance.group)
        for group, names in scored.items() if group in published
    ]  # fmt: skip
    if not subsets and not means:
        raise InputError("no subset and no complete group was scored on both sides; nothing can be compared")
    wrong = {BELOW, ABOVE} if tolerance.above_counts else {BELOW}
    outside = [one for one in subsets if one.is_counted and one.verdict in wrong]
    counted = sum(one.is_counted for one in subsets)
    why_not = []
    if len(outside) > tolerance.outside * counted:
        worst = max(outside, key=lambda one: abs(one.difference))
        why_not.append(
            f"{len(outside)} of {counted} subsets are more than {tolerance.subset} points away, {worst.name} most"
            f" ({worst.difference:+.1f})"
        )
    for one in means:
        if one.verdict in wrong:
            why_not.append(f"{one.name} is {one.ours:.2f}, not {one.theirs:.2f} +- {one.tolerance}")
    missing = [name for name in theirs.subsets if name not in ours]
    return Comparison(subsets, means, missing, why_not)


def read_scores(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """(scores by subset, manifest) of an evaluation, or of the `eval` folder of a run."""
    for place in (folder, folder / "eval"):
        try:
            scores = json.loads((place / "summary.json").read_text())["subsets"]
            return scores, json.loads((place / "manifest.json").read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{place} is not a finished evaluation ({error}); run eval_mmeb.py again") from None
    raise InputError(f"{folder} holds no summary.json with its manifest.json; give a folder of eval_mmeb.py")


def published(benchmark: Benchmark) -> dict[str, Marks]:
    """What is known of others' models on a benchmark, by name."""
    scores = benchmark.published() if benchmark.published else {}
    known = {name: Marks(subsets, "score files of its project") for name, subsets in scores.items()}
    return known | (MARKS if benchmark.name == "mmeb" else {})


def against(name: str, model: str | None, benchmark: Benchmark, names: dict[str, Any]) -> Marks:
    """The other side. Raises `InputError` listing the known models if none is named."""
    if name != "published":
        scores, manifest = read_scores(Path(name))
        if manifest["benchmark"] != benchmark.name:
            raise InputError(f"{name} is of benchmark {manifest['benchmark']}, not {benchmark.name}")
        return Marks(scores, name)
    known = published(benchmark)
    if model is None:
        model = next((one for one in known if str(names.get("model", "")).rstrip("/").endswith(one)), None)
    if model not in known:
        what = "give --model" if model is None else f"no published scores of '{model}'"
        raise InputError(f"{what}; known on {benchmark.name}: {', '.join(sorted(known)) or 'none'}")
    return known[model]


def show(result: Comparison, marks: Marks) -> None:
    width = max(len(line.name) for line in (*result.subsets, *result.means))
    print(f"{'':{width}}    ours  theirs    diff  within  (theirs: {marks.source})")
    for line in (*result.subsets, *result.means):
        note = "" if line.verdict == WITHIN else f"  {line.verdict}"
        note += "" if line.is_counted else "  (theirs is doubtful: not counted)"
        numbers = f"{line.ours:8.2f}{line.theirs:8.2f}{line.difference:+8.2f}{line.tolerance:8.1f}"
        print(f"{line.name:{width}}{numbers}{note}")
    print(result.verdict)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m b3.eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of eval_mmeb.py, or a run with it in eval/")
    parser.add_argument("--against", default="published", help="'published', or the folder of another evaluation")
    parser.add_argument("--model", help="whose published scores (default: the evaluated model's, if there are any)")
    parser.add_argument("--kind", choices=tuple(KINDS), default="checkpoint")
    for name in ("subset", "group", "overall"):
        parser.add_argument(f"--{name}", type=float, metavar="POINTS", help=f"another tolerance of a {name} score")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    arguments = parser.parse_args(argv)
    scores, manifest = read_scores(arguments.run)
    benchmark = registry.load("benchmark", manifest["benchmark"])
    marks = against(arguments.against, arguments.model, benchmark, manifest.get("names") or {})
    changes = {name: getattr(arguments, name) for name in ("subset", "group", "overall")}
    chosen = asdict(KINDS[arguments.kind]) | {name: value for name, value in changes.items() if value is not None}
    result = compare(scores, marks, benchmark, Tolerance(**chosen))
    if arguments.json:
        print(json.dumps({**asdict(result), "verdict": result.verdict, "tolerance": chosen}, indent=1))
    else:
        show(result, marks)
    return NOT_REPRODUCED if result.why_not else 0


if __name__ == "__main__":
    sys.exit(main())
