"""Tables and plots of one question each, as Markdown and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.results import Cell, Results, difference

NAMES = {
    "size": "batch size |B|",
    "examples": "pairs seen",
    "window": "targets of the window [30, 130) in the batch, per query",
    "in_community": "mined negatives per query, in its community",
}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return _percent(cell.mean) + (f" ± {100 * cell.sd:.1f}" if len(cell.records) > 1 else "")


def _gap(cell: Cell | None, control: Cell | None) -> str:
    if cell is None or control is None:
        return ""
    mean, low, high = (100 * x for x in difference(cell, control))
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def pivot(
    results: Results,
    question: str,
    rows: str,
    columns: str,
    control: str | None = None,
    precision: bool = False,
    means: bool = True,
    part: str | None = None,
    **fixed: Any,
) -> str:
    """Mean and standard deviation over seeds, in percent, by two axes; with `control` (a value of `rows`) the paired
    differences from it below, with 95 % intervals, bold where they leave out zero. Without `means` only those. `part`
    as of `Results.cell`.
    """
    across, down = results.values_of(question, columns), results.values_of(question, rows)

    def cell(row: Any, column: Any) -> Cell | None:
        return results.cell(question, precision, part, **{**fixed, rows: row, columns: column})

    head = [f"{rows} \\ {columns}", *(str(c) for c in across)]
    body = [[str(r), *(_shown(cell(r, c)) for c in across)] for r in down]
    body = [line for line in body if means and any(line[1:])]
    if control is not None:
        for row in down:
            line = [_gap(cell(row, c), cell(control, c)) for c in across]
            if row != control and any(line):
                body.append([f"{row} − {control}", *line])
    return markdown(head, body)


def listing(
    results: Results,
    question: str,
    axes: Sequence[str],
    controls: Sequence[str],
    facts: Sequence[str] = (),
    precision: bool = False,
    control_question: str | None = None,
    shared: Sequence[str] = ("size", "student", "examples"),
    part: str | None = None,
) -> str:
    """One line a setting: labels, recorded facts, score, and differences from each of the arms `controls` with the same
    value of the axes `shared` (in `control_question`, if it is another one). `part` as of `Results.cell`.
    """
    seen: list[dict[str, Any]] = []
    for labels, _, _ in results.questions[question]:
        if labels not in seen:
            seen.append(labels)
    body = []
    for labels in seen:
        cell = results.cell(question, precision, part, **labels)
        if cell is None:
            continue
        values = [str(labels.get(axis, "")) for axis in axes]
        known = [cell.fact(fact) for fact in facts]
        line = [*values, *("" if x != x else f"{x:.2f}" for x in known), _shown(cell)]
        for arm in controls:
            same = {axis: labels[axis] for axis in shared if axis in labels}
            other = results.cell(control_question or question, precision, part, **{**same, "arm": arm})
            line.append("" if other is not None and other.records == cell.records else _gap(cell, other))
        body.append(line)
    heads = [*axes, *(f.replace("_", " ") for f in facts), "score", *(f"− {arm}" for arm in controls)]
    return markdown(heads, body)


def by_part(results: Results, question: str, control: str, arms: Sequence[str] | None = None, **fixed: Any) -> str:
    """Score of the arm `control` on each data set, and what the other arms add to it."""
    first = results.cell(question, arm=control, **fixed)
    assert first is not None, f"{question} has no {control}"
    parts = [name for name in first.records[0]["queries"] if "/" not in name]

    def cells(arm: str) -> list[Cell | None]:
        return [results.cell(question, False, part, arm=arm, **fixed) for part in parts]

    own = cells(control)
    body = [[control, *map(_shown, own)]]
    for arm in arms or results.values_of(question, "arm"):
        if arm != control:
            body.append([f"{arm} − {control}", *map(_gap, cells(arm), own)])
    return markdown(["arm", *parts], body)


def plot_lines(
    results: Results,
    question: str,
    x: str,
    by: str,
    path: Path,
    *,
    log: bool = True,
    precision: bool = False,
    title: str = "",
    fact: str | None = None,
    **fixed: Any,
) -> None:
    """Score against an axis, a line for each value of another one; with `fact` named points at what was recorded.

    Bars are the standard deviation over seeds.
    """
    from b3.eval.plots import new_figure, save_figure

    figure, axes = new_figure(6.4, 3.8)
    named: list[tuple[Any, float, str]] = []
    for name in results.values_of(question, by):
        points = []
        for value in (v for v in results.values_of(question, x) if None not in (v, name)):
            cell = results.cell(question, precision, **{**fixed, x: value, by: name})
            if cell is not None:
                where = cell.fact(fact) if fact else value if isinstance(value, (int, float)) else str(value)
                points.append((where, 100 * cell.mean, 100 * cell.sd, str(value)))
        if not points:
            continue
        xs, ys, bars, texts = zip(*points, strict=True)
        label = name if isinstance(name, str) else f"{by} {name}"
        axes.errorbar(xs, ys, yerr=bars, fmt="o" if fact else "o-", capsize=3, label=label)
        named += zip(xs, ys, texts, strict=True) if fact else ()
    for where, height, text in named:  # to the right of its point, or to the left if the next point is there
        is_crowded = any(0 < other - where < 1 and abs(level - height) < 0.1 for other, level, _ in named)
        near, side = (-6, "right") if is_crowded else (6, "left")
        axes.annotate(text, (where, height), xytext=(near, 4), textcoords="offset points", fontsize=8, ha=side)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks([v for v in results.values_of(question, x) if v is not None])
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(NAMES.get(x, x) if fact is None else NAMES.get(fact, fact))
    axes.set_ylabel("precision@1, %" if precision else "MRR, %")
    axes.set_title(title)
    axes.legend(frameon=False)
    save_figure(figure, axes, path)
