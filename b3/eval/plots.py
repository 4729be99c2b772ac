"""Plots of runs and evaluations, written as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from b3.errors import InputError
from b3.eval.benchmark import Benchmark
from b3.files import atomic
from b3.html import running_mean

COLOURS = {"pretrained": "#9aa0a6", "random": "#4c78a8", "b3": "#e4572e", "b3x": "#8c1d40"}
DEFAULT_BASELINES = (
    "gme-Qwen2-VL-2B-Instruct",
    "VLM2Vec-V1-Qwen2VL-2B",
    "VLM2Vec-V2.0-Qwen2VL-2B",
    "VLM2Vec-V1-Qwen2VL-7B",
)
GREYS = ("#d5dbe1", "#b4bfca", "#92a3b5", "#6f879f", "#4d6a88", "#3b536c", "#2a3c50", "#1a2734")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def save_figure(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    with atomic(path) as stream:
        figure.savefig(stream, format=path.suffix[1:])


def plot_losses(metrics: dict[str, list[dict[str, Any]]], path: Path, width: int = 15) -> None:
    """Training loss of each arm: single steps pale, running mean strong.

    Arms see different batches, so a higher loss of one means harder batches, not a worse model.
    """
    figure, axes = new_figure(7, 3.6)
    for arm, lines in metrics.items():
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        colour = COLOURS.get(arm)
        axes.plot(steps, losses, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(steps, running_mean(losses, width), color=colour, label=arm)
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE loss")
    axes.set_title("Training loss (harder batches have a higher loss)", fontsize=10)
    axes.legend(frameon=False)
    save_figure(figure, axes, path)


def plot_precision(results: dict[str, dict[str, Any]], path: Path, benchmark: Benchmark) -> None:
    """Precision@1 by subset and over all, a bar per model; `results` maps a name to a summary of `b3.eval.report`."""
    families = benchmark.families(sorted(next(iter(results.values()))["subsets"]))
    subsets = [subset for names in families.values() for subset in names]
    labels = [*subsets, "mean"]
    figure, axes = new_figure(max(7.0, 0.9 * len(labels) + 1.5), 3.6)
    width = 0.8 / len(results)
    for index, (name, result) in enumerate(results.items()):
        values = [*(100 * result["subsets"][s] for s in subsets), 100 * result["mean"]]
        places = [i + (index - (len(results) - 1) / 2) * width for i in range(len(labels))]
        bars = axes.bar(places, values, width, label=name, color=COLOURS.get(name))
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel("precision@1, percent")
    axes.legend(frameon=False, ncols=len(results))
    save_figure(figure, axes, path)


def _errors(interval: dict[str, Any] | None, means: dict[str, float]) -> list[list[float]] | None:
    """Lengths below and above each bar, in percent, of groups with these `means` (0 to 1); None without an interval."""
    if interval is None:
        return None
    ends = {**interval["families"], **interval.get("modalities", {}), "overall": interval["mean"]}
    below = [max(0.0, 100 * (mean - ends[group][0])) for group, mean in means.items()]
    above = [max(0.0, 100 * (ends[group][1] - mean)) for group, mean in means.items()]
    return [below, above]


def plot_families(
    summary: dict[str, Any],
    path: Path,
    benchmark: Benchmark,
    baselines: list[str] | None = None,
    name: str = "this run",
) -> bool:
    """Bars of the scores by family, modality and overall: published models, then the run, as a PNG.

    Only families (and the overall mean) that the run covers in full are drawn. Returns False, and writes nothing, if
    there is none.

    Args:
        summary: as of `b3.eval.report.summarise`; its `interval`, if it has one, draws error bars.
        benchmark: whose tasks and published scores.
        baselines: models with published scores; default those of `DEFAULT_BASELINES`.
        name: label of the run.

    Raises `InputError` for a model without published scores.
    """
    published = benchmark.published() if benchmark.published else {}
    models = [m for m in DEFAULT_BASELINES if m in published] if baselines is None else list(dict.fromkeys(baselines))
    for model in models:
        if model not in published:
            raise InputError(f"no published scores of '{model}'; known: {', '.join(sorted(published))}")
    ours = benchmark.family_means(summary["subsets"])
    groups = [group for group in ours if group not in ("IND", "OOD")]
    if not groups:
        return False
    columns = {model: benchmark.family_means(published[model]) for model in models} | {name: ours}
    figure, axes = new_figure(max(5.0, 2.0 + len(groups) * (0.5 + 0.22 * len(columns))), 3.8)
    width = 0.84 / len(columns)
    highest = 0.0
    for index, (label, means) in enumerate(columns.items()):
        last = index == len(columns) - 1
        values = [100 * means[group] for group in groups]
        places = [i + (index - (len(columns) - 1) / 2) * width for i in range(len(groups))]
        errors = _errors(summary.get("interval"), {group: means[group] for group in groups}) if last else None
        above = [0.0] * len(values) if errors is None else errors[1]
        highest = max([highest, *(value + up for value, up in zip(values, above, strict=True))])
        colour = COLOURS["b3"] if last else GREYS[index % len(GREYS)]
        bars = axes.bar(
            places, values, width, label=label, color=colour, yerr=errors, ecolor="#333333", error_kw={"elinewidth": 1}
        )
        axes.bar_label(bars, fmt="%.0f" if not last else "%.1f", fontsize=7 if last else 6, padding=1)
    axes.set_xticks(range(len(groups)), [g[0].upper() + g[1:] for g in groups], fontsize=9)
    metrics = sorted({task.metric for task in benchmark.tasks})
    axes.set_ylabel(f"{' or '.join(metrics)}, percent", fontsize=9)
    axes.set_ylim(0, max(1.08 * highest, 1.0))
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=8)
    save_figure(figure, axes, path)
    return True
