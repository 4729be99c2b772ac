"""A page of wrong predictions of one subset: the query, the right candidate, and what was ranked before it."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from b3.data.datasets import EvalDataset
from b3.data.items import Item
from b3.errors import InputError
from b3.eval.intervals import bootstrap_interval
from b3.eval.score import SubsetScore
from b3.files import write_text
from b3.mining.report_text import plain_text, shorten

if TYPE_CHECKING:
    from PIL import Image

LARGE, SMALL = 160, 56
NEXT_BEST = 4
MOST_TEXT = 400


def write_explanations(folder: Path, dataset: EvalDataset, score: SubsetScore, limit: int, seed: int = 0) -> Path:
    """Write `<subset>_errors.html` with up to `limit` wrong predictions and return its path.

    If there are more, a sample, the same for the same `seed`. The most negative margins come first. The
    page is one file; a picture that cannot be read becomes a remark. Raises `InputError` if `limit` is below 1.
    """
    if limit < 1:
        raise InputError(f"the number of wrong predictions to show must be at least 1, not {limit}")
    rows = sample_errors(score, limit, seed)
    cards = "\n".join(_card(dataset, score, row) for row in rows)
    title = f"Wrong predictions: {score.name}"
    path = folder / f"{score.name}_errors.html"
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n{_header(score, len(rows))}\n"
        f"{cards}\n</main></body></html>\n",
    )
    return path


def margin(score: SubsetScore, row: int) -> float:
    """Score of the right candidate less that of the predicted one; negative where the prediction is wrong.

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
        facts += [f"margin <b>{margin(score, row):.3f}</b>", f"the right candidate is number {rank} of {len(items)}"]
    else:
        facts.append("the right candidate could not be scored")
    order = [int(i) for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
    for i in [i for i in order if i not in (0, predicted)][:NEXT_BEST]:
        # a picture needs no instruction that the right candidate shows already
        text = "" if items[i].image is not None and texts[i] == texts[0] else _text(texts[i], 100)
        listed += f"<li>{_number(values[i])} {_picture(items[i], SMALL)}{text}</li>"
    best = ("none", Item(""), "") if predicted < 0 else (_number(values[predicted]), items[predicted], texts[predicted])
    return (
        f'<section><div class="facts">{" · ".join(facts)}</div><div class="three">'
        + _side("Query", "query", query, query.text)
        + _side(f"Right {_number(values[0])}", "right", items[0], texts[0])
        + _side(f"Predicted {best[0]}", "wrong", best[1], best[2])
        + "</div>"
        + (f'<div class="next">Next best<ul>{listed}</ul></div>' if listed else "")
        + "</section>"
    )


def _number(value: float) -> str:
    return f"<code>{value:.3f}</code>" if np.isfinite(value) else "(no score)"


def _side(heading: str, kind: str, item: Item, text: str) -> str:
    return f'<div class="side {kind}"><h2>{heading}</h2>{_picture(item, LARGE)}<p>{_text(text, MOST_TEXT)}</p></div>'


def _text(text: str, most: int) -> str:
    return escape(shorten(plain_text(text), most))


def _picture(item: Item, side: int) -> str:
    """The item's picture as an <img>, '' if it has none, a remark if it cannot be read."""
    try:
        image = item.open_image()
        if image is None:
            return ""
        data = base64.b64encode(_thumbnail(image, side)).decode()
    except (InputError, OSError, ValueError, SyntaxError):  # one bad picture must not cost the page
        return '<em class="bad">unreadable picture</em> '
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def _thumbnail(image: Image.Image, side: int) -> bytes:
    """JPEG of at most `side` pixels a side, transparency laid over white."""
    from PIL import Image

    small = image.convert("RGBA")
    small.thumbnail((side, side))
    sheet = Image.new("RGBA", small.size, "white")
    sheet.alpha_composite(small)
    buffer = io.BytesIO()
    sheet.convert("RGB").save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;margin:0 0 8px}h2{font-size:12.5px;font-weight:600;margin:0 0 8px;color:#52606d}
code{font:12.5px ui-monospace,Menlo,Consolas,monospace;color:#52606d}
.facts{color:#616e7c;font-size:13.5px;margin:0 0 10px}
section{border-top:1px solid #e4e7eb;padding:16px 0 14px}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px}
.side{border-radius:6px;padding:10px 12px;background:#f5f7fa;overflow-wrap:anywhere}
.side img{display:block;max-width:100%;margin:0 0 6px}.side p{margin:0}
.right{background:#eef7f2}.wrong{background:#fdf1ea}
.next{font-size:13px;color:#616e7c;margin-top:10px}
.next ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:4px 0 0;padding:0}
.next li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}.bad{color:#7b8794}
""".replace("\n", "")
