"""Files of a task of ranked lists, in the reference's layout, and the summary of several.

Below the output folder, by modality: `<task>_info.jsonl` (a line per query: the names of its candidates and labels),
`<task>_pred.jsonl` (its whole ranking), `<task>_values.npy` (queries,) float64 of the task's metric, and last
`<task>_score.json` with every metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from b3.eval.benchmark import Benchmark, Task
from b3.eval.ranked import RankedSet
from b3.eval.ranking import Encoded, Ranking, collect, rankings
from b3.eval.ranking_metrics import METRICS
from b3.eval.report import mean, summarise
from b3.files import atomic, write_array, write_json, write_text

MORE_KEYS = ("num_incomplete", "skipped")


def files_of(folder: Path, task: Task) -> dict[str, Path]:
    """Where the files of a task lie, by what they are: "info", "pred", "values", "score"."""
    place = folder / task.modality if task.modality else folder
    names = {"info": "_info.jsonl", "pred": "_pred.jsonl", "values": "_values.npy", "score": "_score.json"}
    return {kind: place / (task.name + name) for kind, name in names.items()}


def write_ranking(folder: Path, task: Task, dataset: RankedSet, encoded: Encoded, skipped: dict[str, str]) -> Ranking:
    """Rank all queries, write the files of the task, and return what is kept of the rankings.

    `skipped` says which items could not be read and why; the score file then has `num_incomplete` and `skipped` too.
    """
    files = files_of(folder, task)
    with atomic(files["info"]) as stream:
        stream.writelines(_line(query.info) for query in dataset.queries)
    ranking = Ranking.empty(dataset)
    with atomic(files["pred"]) as stream:
        for query, one in zip(dataset.queries, collect(dataset, rankings(dataset, encoded), ranking), strict=True):
            stream.write(_line({"prediction": one.names, "label": query.labels, "rel_scores": query.grades}))
    write_array(files["values"], ranking.values[task.metric])
    facts: dict[str, Any] = {name: float(ranking.values[name].mean()) for name in METRICS}
    facts |= {"num_pred": len(dataset), "num_data": len(dataset)}
    if ranking.incomplete.any():
        facts |= {"num_incomplete": int(ranking.incomplete.sum()), "skipped": skipped}
    write_text(files["score"], json.dumps(facts, indent=4))
    return ranking


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def read_ranking(folder: Path, task: Task) -> tuple[dict[str, Any], np.ndarray] | None:
    """(score file, (queries,) values of the task's metric); None if there are none, or torn ones."""
    files = files_of(folder, task)
    try:
        facts = json.loads(files["score"].read_text())
        values = np.load(files["values"], allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = {*METRICS, "num_pred", "num_data"} <= facts.keys() and len(values) == facts["num_data"]
    return (facts, values) if is_whole else None


def ranking_summary(
    folder: Path, subsets: Iterable[str], benchmark: Benchmark, options: dict[str, Any]
) -> dict[str, Any]:
    """As `summarise`, of the files in `folder`; with `metrics` (the score files by task), `tasks` (the metric of each)
    and `settings`, what of the benchmark's options decides a number.
    """
    read = {name: found for name in subsets if (found := read_ranking(folder, benchmark.task(name))) is not None}
    values = {name: facts[benchmark.task(name).metric] for name, (facts, _) in read.items()}
    summary = summarise(values, benchmark, {name: rows for name, (_, rows) in read.items()})
    summary["tasks"] = {name: benchmark.task(name).metric for name in read}
    summary["settings"] = options
    summary["metrics"] = {name: facts for name, (facts, _) in read.items()}
    return summary


def ranking_table(summary: dict[str, Any], benchmark: Benchmark) -> str:
    """A line per task with its metric, then groups, modalities and the mean of all, percent with 95 % intervals."""
    interval = summary["interval"]

    def line(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    def number(value: float, ends: tuple[float, float]) -> list[str]:
        return [f"{100 * value:.1f}", f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"]

    lines = [line("task", "group", "metric", "score", "95 % interval"), "|---|---|---|---:|---:|"]
    for group, names in benchmark.families(summary["subsets"]).items():
        for name in names:
            ends = interval["subsets"][name]
            lines.append(line(name, group, summary["tasks"][name], *number(summary["subsets"][name], ends)))
    for group, value in summary["families"].items():
        lines.append(line(f"**{group}**", "", "", *number(value, interval["families"][group])))
    counted = [name for name in summary["subsets"] if name in benchmark.names]
    groups = {**benchmark.modalities(counted), "mean": counted}
    wholes = {**benchmark.modalities(benchmark.names), "mean": benchmark.names}
    values = {**summary.get("modalities", {}), "mean": summary["mean"]}
    ends_of = {**interval.get("modalities", {}), "mean": interval["mean"]}
    for group, names in groups.items():
        part = f"{len(names)} of {len(wholes[group])} tasks"
        lines.append(line(f"**{group}**", part, "", *number(values[group], ends_of[group])))
    return "\n".join(lines)


def modality_table(columns: dict[str, dict[str, Any]], benchmark: Benchmark) -> str:
    """Means by modality and over all in percent, a column per summary (of the same tasks)."""
    first = next(iter(columns.values()))
    groups = {**benchmark.modalities(first["subsets"]), "mean": [n for n in first["subsets"] if n in benchmark.names]}
    lines = ["| " + " | ".join(["modality", "tasks", *columns]) + " |", "|---|---:" + "|---:" * len(columns) + "|"]
    for group, names in groups.items():
        cells = (f"{100 * mean([column['subsets'][name] for name in names]):.1f}" for column in columns.values())
        lines.append("| " + " | ".join([group, str(len(names)), *cells]) + " |")
    return "\n".join(lines)


def comparison_table(summary: dict[str, Any], benchmark: Benchmark, model: str) -> str:
    """This run beside published models, by modality and over all: means over the tasks that this run scored.

    '' if no model has published scores of them.
    """
    published = benchmark.published() if benchmark.published else {}
    counted = [name for name in summary["subsets"] if name in benchmark.names]
    groups = {**benchmark.modalities(counted), **({"all": counted} if counted else {})}
    if not published or not groups:
        return ""
    head = ["model", *(f"{group} ({len(names)})" for group, names in groups.items())]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * len(groups) + "|"]
    for name, scores in {f"**{model}** (this run)": summary["subsets"], **published}.items():
        cells = [
            f"{100 * mean([scores[task] for task in names]):.1f}" if all(task in scores for task in names) else ""
            for names in groups.values()
        ]
        if any(cells):
            lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def marks_table(marks: list[dict[str, str]]) -> str:
    """What cards and reports give over whole modalities."""
    head = ("model", "date", "harness", "image", "video", "visdoc", "all", "source")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---:|---:|---:|---:|---|"]
    return "\n".join([*lines, *("| " + " | ".join(mark[key] for key in head) + " |" for mark in marks)])


def write_ranking_summary(folder: Path, summary: dict[str, Any], model: str, benchmark: Benchmark) -> None:
    """summary.json, summary.md and, if the benchmark has them, leaderboard.json and families.png (complete groups)."""
    from b3.eval.plots import plot_families

    write_json(folder / "summary.json", summary)
    name = model.rstrip("/").rsplit("/", 1)[-1]
    facts = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
    parts = [f"# {benchmark.name}: {name}", f"Percent; plain means over tasks. Settings: {facts or 'none'}."]
    parts.append(ranking_table(summary, benchmark))
    if "items" in summary:
        parts.append(f"{summary['items']:,} distinct items encoded in {summary['seconds']:.0f} s.")
    parts += [f"note: {note}" for note in summary.get("notes", [])]
    comparison = comparison_table(summary, benchmark, name)
    if comparison:
        parts += ["## Beside published scores", "Means over the tasks of this run alone.", comparison]
    if benchmark.marks is not None and len(benchmark.modalities(summary["subsets"])) > 0:
        parts += ["## Published means over whole modalities", marks_table(benchmark.marks())]
    write_text(folder / "summary.md", "\n\n".join(parts) + "\n")
    if benchmark.leaderboard:
        write_json(folder / "leaderboard.json", benchmark.leaderboard(summary, {"model_name": model}))
    if benchmark.family_means(summary["subsets"]):
        plot_families(summary, folder / "families.png", benchmark, name=name)
