"""Files that an evaluation leaves: the reference's per-subset files, and a summary for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from b3.data.datasets import EvalDataset
from b3.errors import InputError
from b3.eval.benchmark import Benchmark
from b3.eval.score import METRICS, SubsetScore
from b3.files import write_json, write_text


def write_subset(folder: Path, dataset: EvalDataset, score: SubsetScore, metric: str, skipped: dict[str, str]) -> None:
    """`<subset>_pred.txt` (a line per row: the predicted candidate) and, last, `<subset>_score.json`.

    `metric` is a name of `METRICS`. `skipped` says which items could not be read and why; the score file then has
    `num_incomplete` and `skipped` too.
    """
    lines = [
        str(dataset.raw_candidates(row)[index] if index >= 0 else ("<unreadable>", ""))
        for row, index in enumerate(score.predicted.tolist())
    ]
    write_text(folder / f"{score.name}_pred.txt", "".join(line + "\n" for line in lines))
    facts: dict[str, Any] = {
        "acc": METRICS[metric](score),
        "num_correct": score.num_correct,
        "num_pred": score.num_rows,
        "num_data": len(dataset),
    }
    if score.incomplete.any():
        facts["num_incomplete"] = int(score.incomplete.sum())
        facts["skipped"] = skipped
    write_text(folder / f"{score.name}_score.json", json.dumps(facts, indent=4))


def read_score(folder: Path, subset: str) -> dict[str, Any] | None:
    """The score file of a subset, or None if there is none (or a torn one)."""
    try:
        facts = json.loads((folder / f"{subset}_score.json").read_text())
        return facts if {"acc", "num_correct", "num_pred", "num_data"} <= facts.keys() else None
    except (OSError, ValueError):
        return None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summarise(
    scores: dict[str, float], benchmark: Benchmark, rows: Mapping[str, tuple[int, int] | np.ndarray] | None = None
) -> dict[str, Any]:
    """Means by family, in and out of domain, by modality where there are several, and overall, of the scores by subset.

    With `rows`, by subset either (right, rows) or the score of each row, also `interval`: bootstrap 95 % intervals of
    each subset, each group and the mean, rows resampled within their subset. Subsets that do not count are in no mean.
    """
    if not scores:
        raise InputError("no subset was scored")
    families, domains = benchmark.families(scores), benchmark.domains(scores)
    modalities = benchmark.modalities(scores)
    counted = [name for name in scores if benchmark.task(name).is_counted] or list(scores)

    def means(groups: dict[str, list[str]]) -> dict[str, float]:
        return {group: mean([scores[name] for name in names]) for group, names in groups.items()}

    summary: dict[str, Any] = {
        "subsets": scores,
        "families": means(families),
        **({"modalities": means(modalities)} if modalities else {}),
        "mean": mean([scores[name] for name in counted]),
        **means(domains),
    }
    if rows is not None:
        of_rows = {n: np.arange(r[1]) < r[0] if isinstance(r, tuple) else r for n, r in rows.items()}

        def intervals(groups: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
            return {group: bootstrap_mean({name: of_rows[name] for name in groups[group]}) for group in sorted(groups)}

        summary["interval"] = {
            "mean": bootstrap_mean({name: of_rows[name] for name in counted}),
            "families": intervals(families),
            **({"modalities": intervals(modalities)} if modalities else {}),
            "subsets": {name: bootstrap_interval(values) for name, values in of_rows.items()},
        }
    return summary


# How far a score could move with other rows of the same kind: percentile bootstrap over rows. Drawing n rows with
# replacement from n rows of which k are right gives a binomial number of right ones, so that each draw is one binomial
# number and no row is copied. Graded scores are drawn in the same way by their distinct values (multinomial). The
# interval covers the choice of rows, not that of the training run. Where all rows are equal it has no width.


def _draws(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) float64 means of resampled rows."""
    assert values.ndim == 1 and len(values) > 0, "one value per row, at least one row"
    if values.dtype == bool or np.isin(values, (0, 1)).all():
        right = int(np.count_nonzero(values))
        return rng.binomial(len(values), right / len(values), size=draws) / len(values)
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(len(values), counts / len(values), size=draws) @ distinct / len(values)


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    assert 0 < level < 1, "level is a share such as 0.95"
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    correct: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the mean of `correct` ((rows,) bool, or float64 scores): the score of one subset."""
    return _percentiles(_draws(correct, draws, np.random.default_rng(seed)), level)


def bootstrap_mean(
    correct_by_subset: dict[str, np.ndarray], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the plain mean over subsets; rows are drawn within each subset.

    The order of the subsets does not matter.
    """
    assert correct_by_subset, "at least one subset"
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for name in sorted(correct_by_subset):
        total += _draws(correct_by_subset[name], draws, rng)
    return _percentiles(total / len(correct_by_subset), level)


def markdown_table(columns: dict[str, dict[str, Any]], benchmark: Benchmark) -> str:
    """Precision@1 in percent, a row per subset, then families and mean; a column for each summary."""
    names = list(columns)
    rows = [["subset", "family", *names]]
    for family, subsets in benchmark.families(sorted(columns[names[0]]["subsets"])).items():
        for subset in subsets:
            rows.append([subset, family, *(f"{100 * columns[n]['subsets'][subset]:.1f}" for n in names)])
    for family in columns[names[0]]["families"]:
        rows.append([f"**{family}**", "", *(f"{100 * columns[n]['families'][family]:.1f}" for n in names)])
    for label in ("IND", "OOD", "mean"):
        if label in columns[names[0]]:
            rows.append([f"**{label}**", "", *(f"**{100 * columns[n][label]:.1f}**" for n in names)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---" + "|---:" * len(names) + "|")
    return "\n".join(lines)


def write_summary(folder: Path, summary: dict[str, Any], model: str, benchmark: Benchmark) -> None:
    """summary.json, summary.md and, if the benchmark has them, leaderboard.json and families.png."""
    from b3.eval.plots import plot_families

    write_json(folder / "summary.json", summary)
    text = f"Precision@1, percent; plain means over subsets.\n\n{markdown_table({'precision@1': summary}, benchmark)}\n"
    low, high = summary["interval"]["mean"]
    text += (
        f"\nMean: {100 * summary['mean']:.2f}, 95 % interval {100 * low:.2f} to {100 * high:.2f} (rows resampled).\n"
    )
    if "items" in summary:
        text += f"{summary['items']:,} distinct items in {summary['seconds']:.0f} s.\n"
    write_text(folder / "summary.md", text)
    if benchmark.leaderboard and any(name in benchmark.names for name in summary["subsets"]):
        write_json(folder / "leaderboard.json", benchmark.leaderboard(summary, {"model_name": model}))
    if benchmark.published:
        plot_families(summary, folder / "families.png", benchmark, name=model.rstrip("/").rsplit("/", 1)[-1])
