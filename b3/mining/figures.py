"""Charts of the report on a plan, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from b3.console import count as short_count
from b3.console import percent
from b3.html import HEIGHT, WIDTH, chart

POSITIVE, COMMUNITY, PAPER, RANDOM = "#1f7a5c", "#c2501a", "#5b5fc7", "#7b8794"
SIMILARITY = (("positive", "own target", POSITIVE), ("community", "in the community", COMMUNITY),
              ("paper", "paper's recipe", PAPER), ("random", "random community", RANDOM))  # fmt: skip
MASS = (("mined", "in the community", COMMUNITY), ("paper", "paper's recipe", PAPER),
        ("random", "random community", RANDOM))  # fmt: skip


def similarity_figure(h: dict[str, Any], reading: str) -> str:
    """Share of scores in each bin of 0.01, for each group in `h` (``report["histogram"]``); '' without scores."""
    groups = [group for group in SIMILARITY if any(h.get(group[0], ()))]
    if not groups:
        return ""
    counts = np.array([h[key] for key, _, _ in groups], dtype=float)
    shares = counts / counts.sum(axis=1, keepdims=True)
    seen = np.flatnonzero((shares > 5e-4).any(axis=0))
    low, high = max(0, seen[0] - 2), min(shares.shape[1], seen[-1] + 3)
    x = np.linspace(0, WIDTH, high - low + 1)
    peak = shares[:, low:high].max()
    shapes, labels = [], []
    for row, (key, name, colour) in zip(shares[:, low:high], groups, strict=True):
        y = HEIGHT - row / peak * (HEIGHT - 24)
        steps = " ".join(f"{a:.1f},{v:.1f} {b:.1f},{v:.1f}" for a, b, v in zip(x[:-1], x[1:], y, strict=True))
        fill = "none" if key == "paper" else colour
        shapes.append(
            f'<polygon points="0,{HEIGHT} {steps} {WIDTH},{HEIGHT}" fill="{fill}" fill-opacity=".22"'
            f' stroke="{colour}" stroke-width="1.4"/>'
        )
        mean = -1 + 0.01 * (np.average(np.arange(low, high), weights=row) + 0.5)
        labels.append((f"{name} (mean {mean:.2f})", colour))
    start, end = -1 + low * 0.01, -1 + high * 0.01
    step = next(s for s in (0.05, 0.1, 0.2, 0.5) if (end - start) / s <= 9)
    ticks = np.arange(np.ceil(start / step - 1e-9), np.floor(end / step + 1e-9) + 1) * step
    marks = [((tick - start) / (end - start) * WIDTH, f"{tick + 0:.2g}") for tick in ticks]
    return chart("Similarity of a query to targets", shapes, marks, labels, reading)


def mass_figure(h: dict[str, Any], reading: str) -> str:
    """Share of queries (height) that capture at least x of their teacher mass, from ``teacher_mass_histogram``."""
    groups = [group for group in MASS if any(h.get(group[0], ()))]
    shapes, labels = [], []
    counts = np.array([h[key] for key, _, _ in groups], dtype=float)
    least = counts[:, ::-1].cumsum(axis=1)[:, ::-1] / counts.sum(axis=1, keepdims=True)
    seen = np.flatnonzero((least > 2e-3).any(axis=0))
    high = min(counts.shape[1], max(5, int(seen[-1]) + 2))  # nothing to see further right
    for level in (0.5, 1.0):
        y = HEIGHT - level * (HEIGHT - 24)
        text = f"{percent(level, 0)} of queries"
        shapes.append(f'<line x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7eb"/>'
                      f'<text class="end" x="{WIDTH}" y="{y - 4:.1f}">{text}</text>')  # fmt: skip
    x = np.linspace(0, WIDTH, high + 1)
    for row, (_, name, colour) in zip(least, groups, strict=True):
        heights = HEIGHT - np.append(row, 0)[: high + 1] * (HEIGHT - 24)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, heights, strict=True))
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        labels.append((name, colour))
    end = high * h["bin"]
    step = next(s for s in (0.02, 0.05, 0.1, 0.2) if end / s <= 7)
    marks = [(share / end * WIDTH, percent(share, 0)) for share in np.arange(step, end, step)]
    return chart("Queries with at least so much teacher mass in their community", shapes, marks, labels, reading)


def hub_figure(counts: Sequence[int], reading: str) -> str:
    """Targets by the number of windows they are in; `counts` over [0, 1), [1, 2), [2, 4), [4, 8), ..."""
    first = next(number for number, count in enumerate(counts) if count)
    wide = WIDTH / max(8, len(counts) - first)
    peak = max(counts)
    shapes, marks = [], []
    for number, count in enumerate(counts[first:], first):
        height = count / peak * (HEIGHT - 24)
        x = (number - first) * wide
        shapes.append(f'<rect x="{x + 1:.1f}" y="{HEIGHT - height:.1f}" width="{wide - 2:.1f}" height="{height:.1f}"'
                      f' fill="{COMMUNITY}" fill-opacity=".45"/>')  # fmt: skip
        shapes.append(f'<text x="{x + wide / 2:.1f}" y="{HEIGHT - height - 4:.1f}">{short_count(count)}</text>')
        least = (1 << number) >> 1  # of the bar: 0, 1, 2, 4, 8, ...
        marks.append((x + wide / 2, f"{least >> 10}k+" if least >= 1024 else f"{least}+" if least > 1 else str(least)))
    return chart("Targets by the number of windows they are in", shapes, marks, [], reading)
