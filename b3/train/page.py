"""The report of a run: one HTML file with its curves and facts, nothing outside it is needed."""

from __future__ import annotations

import io
import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.config import Config, dump_config
from b3.console import duration
from b3.files import write_text
from b3.train.card import data_rows
from b3.train.checkpoint import read_metrics

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan

Curve = tuple[str, list[float], list[float], str]  # label, steps, values, colour
BLUE, RED, GREEN, GREY = "#1c5d99", "#c8553d", "#3a7d44", "#7b8794"


def write_report(
    folder: Path,
    config: Config,
    datasets: list[PairDataset],
    plans: list[BatchPlan],
    result: dict[str, Any],
) -> Path:
    """Write `folder`/report.html from its metrics.jsonl and environment.json."""
    metrics, evaluations = read_metrics(folder), read_metrics(folder, "evaluation")
    environment = json.loads((folder / "environment.json").read_text())
    parts = [
        f"<h1>{escape(config.name)}</h1>",
        f'<p class="facts">{escape(_headline(config, environment, result))}</p>',
        _tiles(metrics, evaluations, result),
        '<div class="plots">' + "".join(_plots(metrics, evaluations)) + "</div>",
    ]
    if evaluations:
        parts += ["<h2>Evaluation</h2>", _evaluation_table(evaluations)]
    parts += ["<h2>Data</h2>", _table(data_rows(datasets, plans))]
    if result["replaced_rows"]:
        parts.append(f"<p>{result['replaced_rows']} unreadable rows gave their place to others: bad_rows.jsonl.</p>")
    parts += [
        "<h2>Machine</h2>",
        _table([["", ""], *([key, _plain(value)] for key, value in environment.items())]),
        "<h2>Recipe</h2>",
        f"<pre>{escape(dump_config(config))}</pre>",
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(config.name)}: training</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    file = folder / "report.html"
    write_text(file, page)
    return file


def _headline(config: Config, environment: dict[str, Any], result: dict[str, Any]) -> str:
    ranks = environment["world_size"]
    where = f"{ranks} x {environment['gpu']}" if environment["gpu"] else f"{ranks} CPU rank{'s' * (ranks > 1)}"
    return (
        f"{config.train.steps} steps of {config.batch.size} pairs, policy {config.batch.policy},"
        f" {config.negatives.per_query} hard negatives a query, {config.model.name}, {where};"
        f" the last part took {duration(result['seconds'])}"
    )


def _tiles(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], result: dict[str, Any]) -> str:
    tail = metrics[-20:]
    if not tail:
        return ""
    figures = [
        ("loss", f"{_mean(tail, 'loss'):.3f}"),
        ("in-batch precision@1", f"{100 * _mean(tail, 'in_batch_precision'):.0f} %"),
        ("pairs a second", f"{_mean(tail, 'pairs_per_second'):,.0f}"),
        ("waiting for data", f"{100 * _mean(tail, 'waiting_for_data'):.0f} %"),
        ("peak memory", f"{max(line['peak_memory_bytes'] for line in metrics) / 2**30:.2f} GiB"),
    ]
    if tail[-1]["mfu"] is not None:
        figures.append(("model FLOP utilisation", f"{100 * _mean(tail, 'mfu'):.0f} %"))
    if evaluations:
        figures.append(("evaluation precision@1", f"{100 * evaluations[-1]['evaluation']['mean']:.1f} %"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in figures)
    count = len(tail)
    return f'<div class="tiles">{cells}</div><p class="facts">Means over the last {count} lines of the log.</p>'


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def _plots(metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[str]:
    def curve(label: str, key: str, colour: str, scale: float = 1.0) -> Curve:
        known = [line for line in metrics if line.get(key) is not None]
        return label, [line["step"] for line in known], [scale * line[key] for line in known], colour

    plots = [
        _plot("InfoNCE loss", [curve("loss", "loss", BLUE)]),
        _plot("In-batch precision@1", [curve("precision@1", "in_batch_precision", GREEN)]),
        _plot(
            "Cosine similarity",
            [
                curve("positive", "positive_similarity", BLUE),
                curve("hardest negative", "hardest_negative_similarity", RED),
            ],
        ),
        _plot("Gradient norm", [curve("gradient norm", "grad_norm", GREY)]),
        _plot("Learning rate", [curve("learning rate", "learning_rate", GREY)], smoothed=False),
        _plot("Pairs a second", [curve("pairs a second", "pairs_per_second", BLUE)], zero=True),
        _plot("Waiting for data, % of the time", [curve("waiting", "waiting_for_data", RED, 100.0)], zero=True),
    ]
    if evaluations:
        steps = [float(line["step"]) for line in evaluations]
        means = [100 * line["evaluation"]["mean"] for line in evaluations]
        plots.append(_plot("Evaluation, mean precision@1, %", [("mean", steps, means, GREEN)], smoothed=False))
    return [plot for plot in plots if plot]


def _plot(title: str, curves: list[Curve], smoothed: bool = True, zero: bool = False) -> str:
    """A figure with an inline SVG: single lines of the log pale, their running mean strong."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = [c for c in curves if c[1]]
    if not curves:
        return ""
    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for label, steps, values, colour in curves:
        width = max(1, len(values) // 25)
        marker = "o" if len(values) < 3 else None
        if smoothed and width > 1:
            axes.plot(*_thinned(steps, values), color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, width)
        axes.plot(*_thinned(steps, values), color=colour, linewidth=1.5, label=label, marker=marker)
    axes.set_xlabel("step", fontsize=8, color="#616e7c")
    axes.tick_params(labelsize=8, colors="#616e7c")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set(size=8, color="#616e7c")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.02)
    if zero:
        axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # names inside the pictures must not clash, nor change
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<figure><figcaption>{escape(title)}</figcaption>{text[text.index('<svg') :]}</figure>"


def _thinned(steps: list[float], values: list[float], most: int = 600) -> tuple[list[float], list[float]]:
    """At most `most` points, the last one among them; a page must not grow with the run."""
    stride = max(1, -(-len(steps) // most))
    return steps[::-1][::stride][::-1], values[::-1][::stride][::-1]


def _running_mean(values: list[float], width: int) -> list[float]:
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        result.append(total / min(index + 1, width))
    return result


def _evaluation_table(evaluations: list[dict[str, Any]]) -> str:
    shown = evaluations if len(evaluations) <= 8 else [*evaluations[:: -(-len(evaluations) // 7)], evaluations[-1]]
    rows = [["precision@1, %", *(f"step {line['step']}" for line in shown)]]
    for name in shown[-1]["evaluation"]:
        rows.append([name, *(f"{100 * line['evaluation'][name]:.1f}" for line in shown)])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "none" if value is None else str(value)


STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:40px 0 8px;padding-top:18px;border-top:1px solid #e4e7eb}
.facts{color:#616e7c;font-size:13.5px;margin:2px 0 14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:16px 0 6px}
.tile{border:1px solid #e4e7eb;border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:#616e7c;font-size:12.5px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:22px 28px;margin-top:14px}
figure{margin:0}figcaption{font-size:14px;font-weight:600;margin-bottom:2px}svg{width:100%;height:auto;display:block}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 18px 5px 0;text-align:left;border-bottom:1px solid #edf0f2;vertical-align:top}
th{font-weight:400;color:#616e7c;font-size:12.5px}
pre{background:#f7f9fa;border-radius:8px;padding:14px 16px;font-size:12.5px;line-height:1.45;overflow-x:auto}
""".replace("\n", "")
