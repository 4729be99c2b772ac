"""Rows of a data set shown in the report: pictures and texts of communities, likely false negatives and hubs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.mining.report_text import drop_shared, percent, plain_text, shared_words, shorten

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 72
MOST_MEMBERS = 36
SAMPLE = 64
PNG_BYTES = 3000  # drawings, which stay below, keep their sharp edges


class Cards:
    """Shows items of `records`, without the instruction that all of them share.

    Args:
        records: see `b3.mining.page.Section`; None: row numbers are shown.
        rows: rows that will be shown; with a sample of the others they tell what is shared.
    """

    def __init__(self, records: Any, rows: Iterable[int]) -> None:
        self.records = records
        self.shared: dict[str, tuple[int, int]] = {}
        self.pictures = False
        if records is None:
            return
        looked = {int(row) for row in rows}
        looked |= {int(row) for row in np.linspace(0, len(records) - 1, min(SAMPLE, len(records)))}
        for side in ("query", "target"):
            items = [getattr(records, side)(row) for row in sorted(looked)]
            self.shared[side] = shared_words(plain_text(item.text) for item in items)
            self.pictures |= any(item.image is not None for item in items)

    @property
    def layout(self) -> str:
        """Further class of grids: texts need wider cells than pictures."""
        return "" if self.pictures else " texts"

    def show(self, side: str, row: int) -> str:
        """Picture and text of the "query" or "target" of a row."""
        if self.records is None:
            return f"<span>{side} of row {row:,}</span>"
        item = getattr(self.records, side)(row)
        full = plain_text(item.text)
        text = drop_shared(full, self.shared[side])
        picture = _picture(item)
        if not text and not picture:
            text = full
        short = shorten(text, 70 if picture else 120 if self.pictures else 200)
        title = f' title="{escape(shorten(full, 300))}"' if full and full != short else ""
        return picture + (f"<span{title}>{escape(short)}</span>" if short else "")


def shown_rows(r: dict[str, Any]) -> set[int]:
    """Rows of which the report shows query or target."""
    rows = {int(row) for example in r["examples"] for row in example["rows"][:MOST_MEMBERS]}
    rows |= {pair[key] for pair in r.get("likely_false_negatives", ()) for key in ("row", "other_row")}
    rows |= {row for example in r.get("duplicate_examples", ()) for row in example["rows"]}
    return rows | {target["row"] for target in r.get("hubs", {}).get("targets", ())}


def contact_sheets(cards: Cards, r: dict[str, Any]) -> str:
    """A sheet for each example community of the report; none twice."""
    sheets, seen = [], set()
    for example in r["examples"]:
        if example["community"] not in seen:
            seen.add(example["community"])
            sheets.append(_sheet(cards, example, r["community_size"]))
    return "\n".join(sheets)


def _sheet(cards: Cards, example: dict[str, Any], size: int) -> str:
    shown = []
    for row, hits in list(zip(example["rows"], example["mined_negatives"], strict=True))[:MOST_MEMBERS]:
        shown.append(
            f'<div class="card"><div class="side">{cards.show("query", row)}</div>'
            f'<div class="side target">{cards.show("target", row)}</div>'
            f'<div class="hits">{hits} of {size - 1} hard</div></div>'
        )
    more = f" (first {MOST_MEMBERS} members)" if size > MOST_MEMBERS else ""
    return (
        f"<h4>Community at the {example['percentile']}th percentile of hardness{more}"
        f" <small>{example['mined_negatives_per_query']:.1f} hard negatives a query</small></h4>"
        f'<div class="sheet{cards.layout}">' + "".join(shown) + "</div>"
    )


def false_negative_table(cards: Cards, pairs: list[dict[str, Any]], depth: int) -> str:
    """One line a pair: query, own target, and the other member's target that the teacher prefers.

    `depth`: ranks below it are known (p + m).
    """
    lines = []
    for pair in pairs:
        own = _scored(cards.show("target", pair["row"]), pair["positive_score"], pair["positive_rank"], depth)
        other = _scored(cards.show("target", pair["other_row"]), pair["negative_score"], pair["negative_rank"], depth)
        lines.append(
            f'<div class="side">{cards.show("query", pair["row"])}</div><div class="side target">{own}</div>'
            f'<div class="side doubt">{other}</div>'
        )
    head = "<b>query</b><b>its own target</b><b>target of another member</b>"
    return f'<div class="triples{cards.layout}">{head}{"".join(lines)}</div>' if lines else ""


def _scored(shown: str, score: float, rank: int | None, depth: int) -> str:
    place = f"beyond rank {depth - 1}" if rank is None else f"rank {rank}"
    return f"{shown}<small>similarity {score:.2f}, {place}</small>"


def duplicate_table(cards: Cards, examples: list[dict[str, Any]]) -> str:
    """One line a target that several members of a community share: two of their queries, and the target."""
    lines = [
        f'<div class="side">{cards.show("query", example["rows"][0])}</div>'
        f'<div class="side">{cards.show("query", example["rows"][1])}</div>'
        f'<div class="side target">{cards.show("target", example["rows"][0])}'
        f"<small>shared by {example['members']:,} rows with another member</small></div>"
        for example in examples
    ]
    head = "<b>query</b><b>query of another member</b><b>the target of both</b>"
    return f'<div class="triples{cards.layout}">{head}{"".join(lines)}</div>' if lines else ""


def hub_cards(cards: Cards, targets: list[dict[str, Any]], num_rows: int) -> str:
    """The most frequent hard negatives."""
    shown = []
    for target in targets:
        drawn = "" if target["drawn"] is None else f", drawn {target['drawn']:,}×"
        shown.append(
            f'<div class="card"><div class="side target">{cards.show("target", target["row"])}</div>'
            f'<div class="hits">{target["windows"]:,} windows'
            f" ({percent(target['windows'] / num_rows)}){drawn}</div></div>"
        )
    return f'<div class="sheet{cards.layout} hubs">' + "".join(shown) + "</div>"


def _picture(item: Any) -> str:
    """The item's picture as an <img>, '' if it has none, a remark if it cannot be read."""
    from b3.errors import InputError

    if item.image is None:
        return ""
    try:
        kind, data = smallest(_open(item.image))
    except (OSError, ValueError, SyntaxError, InputError):  # one bad picture must not cost the report
        return '<em class="bad">unreadable picture</em>'
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _open(image: Any) -> Image.Image:
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return Image.open(image)
    opened: Image.Image = image.open() if hasattr(image, "open") else image
    return opened


def thumbnail(image: Image.Image) -> bytes:
    """PNG of at most 72 pixels a side and 128 colours, transparency laid over white."""
    return _png(_small(image))


def smallest(image: Image.Image) -> tuple[str, bytes]:
    """The same as ("png", bytes), or as ("jpeg", bytes) where that is smaller and the other is large."""
    small = _small(image)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75, optimize=True)
    png, jpeg = _png(small), buffer.getvalue()
    return ("png", png) if len(png) <= max(PNG_BYTES, len(jpeg)) else ("jpeg", jpeg)


def _small(image: Image.Image) -> Image.Image:
    from PIL import Image

    small = image.convert("RGBA")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    sheet = Image.new("RGBA", small.size, "white")
    sheet.alpha_composite(small)
    return sheet.convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
