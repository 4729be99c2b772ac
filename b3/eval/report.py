"""Files that an evaluation leaves: the reference's per-subset files, and a summary for people and programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from b3.data.records import EvalDataset
from b3.errors import InputError
from b3.eval.score import SubsetScore
from b3.eval.tasks import FAMILIES, TASKS, family_of
from b3.files import write_atomic


def write_subset(folder: Path, dataset: EvalDataset, score: SubsetScore) -> None:
    """`<subset>_pred.txt` (a line a row: the predicted candidate) and, last, `<subset>_score.json`."""
    lines = [str(dataset.raw_candidates(row)[index]) for row, index in enumerate(score.predicted.tolist())]
    write_atomic(folder / f"{score.name}_pred.txt", "".join(line + "\n" for line in lines))
    facts = {
        "acc": score.precision,
        "num_correct": score.num_correct,
        "num_pred": score.num_rows,
        "num_data": len(dataset),
    }
    write_atomic(folder / f"{score.name}_score.json", json.dumps(facts, indent=4))


def read_score(folder: Path, subset: str) -> dict[str, Any] | None:
    """The score file of a subset, or None if there is none (or a torn one)."""
    try:
        facts = json.loads((folder / f"{subset}_score.json").read_text())
        return facts if {"acc", "num_correct", "num_pred", "num_data"} <= facts.keys() else None
    except (OSError, ValueError):
        return None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summarise(precision: dict[str, float]) -> dict[str, Any]:
    """Means by family, in and out of domain, and overall, from precision@1 by subset."""
    if not precision:
        raise InputError("no subset was scored")
    families = {}
    for family in (*FAMILIES, "Other"):
        values = [value for name, value in precision.items() if family_of(name) == family]
        if values:
            families[family] = mean(values)
    summary: dict[str, Any] = {"subsets": precision, "families": families, "mean": mean(list(precision.values()))}
    for label, wanted in (("IND", True), ("OOD", False)):
        values = [v for name, v in precision.items() if name in TASKS and TASKS[name].in_domain is wanted]
        if values:
            summary[label] = mean(values)
    return summary


def markdown_table(columns: dict[str, dict[str, Any]]) -> str:
    """Precision@1 in percent, a row a subset, then families and mean; a column for each summary."""
    names = list(columns)
    subsets = list(next(iter(columns.values()))["subsets"])
    subsets.sort(key=lambda s: ((*FAMILIES, "Other").index(family_of(s)), s))
    rows = [["subset", "family", *names]]
    for subset in subsets:
        rows.append([subset, family_of(subset), *(f"{100 * columns[n]['subsets'][subset]:.1f}" for n in names)])
    for family in columns[names[0]]["families"]:
        rows.append([f"**{family}**", "", *(f"{100 * columns[n]['families'][family]:.1f}" for n in names)])
    for label in ("IND", "OOD", "mean"):
        if label in columns[names[0]]:
            rows.append([f"**{label}**", "", *(f"**{100 * columns[n][label]:.1f}**" for n in names)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---" + "|---:" * len(names) + "|")
    return "\n".join(lines)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json and summary.md."""
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    text = f"Precision@1, percent; plain means over subsets.\n\n{markdown_table({'precision@1': summary})}\n"
    write_atomic(folder / "summary.md", text)
