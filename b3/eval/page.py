"""A page of wrong predictions of one subset: the query, the right candidate, and what was ranked before it."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from b3 import html
from b3.data.datasets import EvalDataset
from b3.data.items import Item
from b3.errors import InputError
from b3.eval.report import bootstrap_interval
from b3.eval.score import SubsetScore
from b3.files import write_text
from b3.html import image_tag, plain_text, shorten

LARGE, SMALL = 160, 56
NEXT_BEST = 4
MOST_TEXT = 400


def write_explanations(folder: Path, dataset: EvalDataset, score: SubsetScore, limit: int, seed: int = 0) -> Path:
    """Write `<subset>_errors.html` with up to `limit` wrong predictions and return its path.

    If there are more, a sample, the same for the same `seed`. The most negative margins come first. The
    page is one file; an image that cannot be read becomes a remark. Raises `InputError` if `limit` is below 1.
    """
    if limit < 1:
        raise InputError(f"the number of wrong predictions to show must be at least 1, not {limit}")
    rows = sample_errors(score, limit, seed)
    title = f"Wrong predictions: {score.name}"
    path = folder / f"{score.name}_errors.html"
    parts = [f"<h1>{escape(title)}</h1>", _header(score, len(rows)), *(_card(dataset, score, row) for row in rows)]
    write_text(path, html.page(title, parts))
    return path


def margin(score: SubsetScore, row: int) -> float:
    """Score of the right candidate minus that of the predicted one; negative where the prediction is wrong.

    Minus infinity if the right candidate, or the whole row, could not be scored.
    """
    values, predicted = score.scores[row], score.predicted[row]
    return float(values[0] - values[predicted]) if predicted >= 0 else -np.inf


def sample_errors(score: SubsetScore, limit: int, seed: int = 0) -> list[int]:
    """Up to `limit` wrong rows, drawn without replacement; most negative margin first, rows without one last."""
    wrong = np.flatnonzero(score.predicted != 0)
    if len(wrong) > limit:
        wrong = np.random.default_rng(seed).choice(wrong, size=limit, replace=False)
    return sorted(wrong.tolist(), key=lambda row: (not np.isfinite(margin(score, row)), margin(score, row), row))


def _header(score: SubsetScore, shown: int) -> str:
    low, high = bootstrap_interval(score.predicted == 0)
    wrong = score.num_rows - score.num_correct
    facts = (
        f"precision@1 <b>{100 * score.precision:.1f} %</b> (95 % interval {100 * low:.1f} to {100 * high:.1f})"
        f" · {score.num_rows:,} rows, {wrong:,} wrong"
    )
    if score.incomplete.any():
        facts += f" · {int(score.incomplete.sum()):,} rows with something unreadable"
    if not wrong:
        return f'<p class="facts">{facts}</p>\n<p>No prediction is wrong.</p>'
    which = "all of them" if shown == wrong else f"a random sample of {shown}"
    return f'<p class="facts">{facts} · shown: {which}, most negative margin first</p>'


def _card(dataset: EvalDataset, score: SubsetScore, row: int) -> str:
    values, predicted = score.scores[row], int(score.predicted[row])
    texts = [text for text, _ in dataset.raw_candidates(row)]
    items = dataset.candidates(row)
    query = dataset.query(row)
    facts, listed = [f"row {row}"], ""
    if np.isfinite(margin(score, row)):
        rank = int((values > values[0]).sum()) + 1
        facts += [f"margin <b>{margin(score, row):.3f}</b>", f"the right candidate ranks {rank} of {len(items)}"]
    else:
        facts.append("the right candidate could not be scored")
    order = [int(i) for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
    for i in [i for i in order if i not in (0, predicted)][:NEXT_BEST]:
        # an image needs no instruction that the right candidate shows already
        text = "" if items[i].image is not None and texts[i] == texts[0] else _text(texts[i], 100)
        listed += f"<li>{_number(values[i])} {image_tag(items[i].image, SMALL)} {text}</li>"
    best = ("none", Item(""), "") if predicted < 0 else (_number(values[predicted]), items[predicted], texts[predicted])
    return (
        f'<section class="error"><div class="facts">{" · ".join(facts)}</div><div class="panels">'
        + _side("Query", "query", query, query.text or "")
        + _side(f"Right {_number(values[0])}", "right", items[0], texts[0])
        + _side(f"Predicted {best[0]}", "wrong", best[1], best[2])
        + "</div>"
        + (f'<div class="next">Next best<ul>{listed}</ul></div>' if listed else "")
        + "</section>"
    )


def _number(value: float) -> str:
    return f"<code>{value:.3f}</code>" if np.isfinite(value) else "(no score)"


def _side(heading: str, kind: str, item: Item, text: str) -> str:
    image, words = image_tag(item.image, LARGE), _text(text, MOST_TEXT)
    return f'<div class="panel {kind}"><h3>{heading}</h3>{image}<p>{words}</p></div>'


def _text(text: str, most: int) -> str:
    return escape(shorten(plain_text(text), most))
