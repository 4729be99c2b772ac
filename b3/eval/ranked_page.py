"""A page of wrong predictions of a task of ranked lists: frames and pages as images."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from b3 import html
from b3.data.items import Item, Still
from b3.eval.ranked import Name, RankedSet
from b3.eval.ranking import Ranking
from b3.eval.report import bootstrap_interval
from b3.files import write_text

LARGE, FRAME, SMALL = 260, 84, 56
FRAMES = 8  # of a video, at most
NEXT_BEST = 4
MOST_TEXT = 400


def write_ranked_explanations(
    folder: Path, dataset: RankedSet, ranking: Ranking, metric: str, limit: int, seed: int = 0
) -> Path:
    """Write `<task>_errors.html` with up to `limit` queries whose first candidate is wrong, and return its path.

    If there are more, a sample, the same for the same `seed`. Those whose right candidate is furthest behind come
    first. The page is one file; an image that cannot be read becomes a remark.
    """
    wrong = np.flatnonzero(ranking.values["hit@1"] == 0)
    rows = wrong if len(wrong) <= limit else np.random.default_rng(seed).choice(wrong, size=limit, replace=False)
    order = sorted(rows.tolist(), key=lambda row: (margin(ranking, row), row))
    low, high = bootstrap_interval(ranking.values[metric])
    facts = (
        f"{metric} <b>{100 * ranking.values[metric].mean():.1f} %</b> (95 % interval {100 * low:.1f} to"
        f" {100 * high:.1f}) · {len(dataset):,} queries, the first candidate of {len(wrong):,} is wrong"
    )
    if ranking.incomplete.any():
        facts += f" · {int(ranking.incomplete.sum()):,} queries with something unreadable"
    title = f"Wrong predictions: {dataset.name}"
    cards = [_card(dataset, ranking, row) for row in order] or ["<p>No prediction is wrong.</p>"]
    path = folder / f"{dataset.name}_errors.html"
    write_text(path, html.page(title, [f"<h1>{escape(title)}</h1>", f'<p class="facts">{facts}</p>', *cards]))
    return path


def margin(ranking: Ranking, row: int) -> float:
    """Score of the best right candidate minus that of the first; minus infinity if no right one is ranked."""
    right, best = ranking.right[row], ranking.best[row]
    return -np.inf if right is None or not best.names else right[1] - float(best.scores[0])


def _card(dataset: RankedSet, ranking: Ranking, row: int) -> str:
    query, best, right = dataset.queries[row], ranking.best[row], ranking.right[row]
    facts = [f"row {row}"]
    if right is not None:
        facts += [f"margin <b>{margin(ranking, row):.3f}</b>", f"the first right candidate ranks {right[2]}"]
    else:
        facts.append("no right candidate was ranked")
    shown = right[0] if right is not None else query.labels[0]
    panels = _panel("Query", "query", query.item)
    panels += _panel(_head("Right", shown, right[1] if right else None), "right", dataset.candidates.get(shown))
    if best.names:
        head = _head("Predicted", best.names[0], float(best.scores[0]))
        panels += _panel(head, "wrong", dataset.candidates[best.names[0]])
    following = [(n, s) for n, s in zip(best.names[1:], best.scores[1:], strict=True) if n != shown][:NEXT_BEST]
    listed = "".join(
        f"<li><code>{score:.3f}</code> {_media(dataset.candidates[name], SMALL, SMALL, 1)} {escape(_short(name))}</li>"
        for name, score in following
    )
    return (
        f'<section class="error"><div class="facts">{" · ".join(facts)}</div><div class="panels">{panels}</div>'
        + (f'<div class="next">Next best<ul>{listed}</ul></div>' if listed else "")
        + "</section>"
    )


def _head(kind: str, name: Name, score: float | None) -> str:
    return f"{kind} {'' if score is None else f'<code>{score:.3f}</code> '}{escape(_short(name))}"


def _short(name: Name) -> str:
    return html.shorten(str(name).rsplit("/", 1)[-1], 80)


def _panel(heading: str, kind: str, item: Item | None) -> str:
    """`heading` is HTML."""
    if item is None:
        return f'<div class="panel {kind}"><h3>{heading}</h3></div>'
    words = " ".join(word for word in (item.instruction, item.text) if word)
    text = escape(html.shorten(html.plain_text(words), MOST_TEXT))
    return f'<div class="panel {kind}"><h3>{heading}</h3>{_media(item, LARGE, FRAME, FRAMES)}<p>{text}</p></div>'


def _media(item: Item, side: int, frame_side: int, frames: int) -> str:
    """Images, and of videos up to so many frames in a row."""
    tags = []
    for medium in item.media:
        if isinstance(medium, Still):
            tags.append(html.image_tag(medium, side))
        elif not medium.file:
            strip = "".join(html.image_tag(frame, frame_side) for frame in medium.sample(frames, 1.0))
            tags.append(f'<div class="frames">{strip}</div>')
    return "".join(tags)
