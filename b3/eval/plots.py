"""Pictures of runs and evaluations, written as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from b3.eval.benchmarks.mmeb import FAMILIES, family_of

COLOURS = {"untrained": "#9aa0a6", "random": "#4c78a8", "b3": "#e4572e"}


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(values: list[float], width: int) -> list[float]:
    """Mean over the last `width` values at each point (fewer at the start)."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def plot_losses(metrics: dict[str, list[dict[str, Any]]], path: Path, width: int = 15) -> None:
    """Training loss of each arm: single steps pale, running mean strong.

    Arms see different batches, so a higher loss of one means harder batches, not a worse model.
    """
    figure, axes = new_figure(7, 3.6)
    for arm, lines in metrics.items():
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        colour = COLOURS.get(arm)
        axes.plot(steps, losses, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(steps, smooth(losses, width), color=colour, label=arm)
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE loss")
    axes.set_title("Training loss (harder batches have a higher loss)", fontsize=10)
    axes.legend(frameon=False)
    save_figure(figure, axes, path)


def plot_precision(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Precision@1 by subset and over all, a bar a model; `results` maps a name to a summary of `b3.eval.report`."""
    first = next(iter(results.values()))
    subsets = sorted(first["subsets"], key=lambda s: ((*FAMILIES, "Other").index(family_of(s)), s))
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
