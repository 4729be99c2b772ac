"""The page of a run: one HTML file with its curves and facts, nothing outside it is needed."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from b3 import html
from b3.console import duration, num_bytes
from b3.files import write_text
from b3.html import BLUE, GREEN, GREY, RED, Curve, line_plot


def write_page(
    file: Path,
    config: dict[str, Any],
    recipe: str,
    data: list[list[str]],
    environment: dict[str, Any],
    metrics: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    result: dict[str, Any],
) -> None:
    """Write the page.

    Args:
        file: where to.
        config: the recipe as a tree.
        recipe: its text.
        data: a header, and a row per data set.
        environment: of environment.json.
        metrics, evaluations: lines of metrics.jsonl.
        result: of result.json.
    """
    parts = [
        f"<h1>{escape(config['name'])}</h1>",
        f'<p class="facts">{escape(_headline(config, environment, result))}</p>',
        _tiles(metrics, evaluations),
        '<div class="plots">' + "".join(_plots(metrics, evaluations)) + "</div>",
    ]
    if evaluations:
        parts += ["<h2>Evaluation</h2>", _evaluation_table(evaluations)]
    parts += ["<h2>Data</h2>", _table(data)]
    if result["replaced_rows"]:
        parts.append(f"<p>{result['replaced_rows']} unreadable rows were replaced by others, see bad_rows.jsonl.</p>")
    machine = [["", ""], *([key, _plain(value)] for key, value in environment.items())]
    parts += ["<h2>Machine</h2>", _table(machine), "<h2>Recipe</h2>", f"<pre>{escape(recipe)}</pre>"]
    write_text(file, html.page(f"{config['name']}: training", parts))


def _table(rows: list[list[str]]) -> str:
    head, *lines = [[escape(cell) for cell in row] for row in rows]
    return html.table(head, lines)


def _headline(config: dict[str, Any], environment: dict[str, Any], result: dict[str, Any]) -> str:
    ranks = environment["world_size"]
    where = f"{ranks} x {environment['gpu']}" if environment["gpu"] else f"{ranks} CPU rank{'s' * (ranks > 1)}"
    return (
        f"{config['train']['steps']} steps of {config['batch']['size']} pairs, policy {config['batch']['policy']},"
        f" {config['negatives']['per_query']} hard negatives per query, {config['model']['name']}, {where};"
        f" {duration(result['seconds'])} since the last start"
    )


def _tiles(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    tail = metrics[-20:]
    if not tail:
        return ""
    figures = [
        ("loss", f"{_mean(tail, 'loss'):.3f}"),
        ("in-batch precision@1", f"{100 * _mean(tail, 'in_batch_precision'):.0f} %"),
        ("pairs per second", f"{_mean(tail, 'pairs_per_second'):,.0f}"),
        ("waiting for data", f"{100 * _mean(tail, 'waiting_for_data'):.0f} %"),
        ("peak memory", num_bytes(max(line["peak_memory_bytes"] for line in metrics))),
    ]
    if tail[-1]["mfu"] is not None:
        figures.append(("model FLOP utilisation", f"{100 * _mean(tail, 'mfu'):.0f} %"))
    if evaluations:
        figures.append(("evaluation precision@1", f"{100 * evaluations[-1]['evaluation']['mean']:.1f} %"))
    return f'{html.tiles(figures)}<p class="facts">Means over the last {len(tail)} lines of the log.</p>'


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def _plots(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[str]:
    def curve(label: str, key: str, colour: str, scale: float = 1.0) -> Curve:
        lines = [line for line in metrics if line.get(key) is not None]
        return label, [line["step"] for line in lines], [scale * line[key] for line in lines], colour

    plots = [
        line_plot("InfoNCE loss", [curve("loss", "loss", BLUE)]),
        line_plot("In-batch precision@1", [curve("precision@1", "in_batch_precision", GREEN)]),
        line_plot(
            "Cosine similarity",
            [
                curve("positive", "positive_similarity", BLUE),
                curve("hardest negative", "hardest_negative_similarity", RED),
            ],
        ),
        line_plot("Gradient norm", [curve("gradient norm", "grad_norm", GREY)]),
        line_plot("Learning rate", [curve("learning rate", "learning_rate", GREY)], smoothed=False),
        line_plot("Pairs per second", [curve("pairs per second", "pairs_per_second", BLUE)], zero=True),
        line_plot("Waiting for data, % of the time", [curve("waiting", "waiting_for_data", RED, 100.0)], zero=True),
    ]
    if evaluations:
        steps = [float(line["step"]) for line in evaluations]
        means = [100 * line["evaluation"]["mean"] for line in evaluations]
        plots.append(line_plot("Evaluation, mean precision@1, %", [("mean", steps, means, GREEN)], smoothed=False))
    return [plot for plot in plots if plot]


def _evaluation_table(evaluations: list[dict[str, Any]]) -> str:
    columns = evaluations if len(evaluations) <= 8 else [*evaluations[:: -(-len(evaluations) // 7)], evaluations[-1]]
    rows = [["precision@1, %", *(f"step {line['step']}" for line in columns)]]
    for name in columns[-1]["evaluation"]:
        rows.append([name, *(f"{100 * line['evaluation'][name]:.1f}" for line in columns)])
    return _table(rows)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "none" if value is None else str(value)
