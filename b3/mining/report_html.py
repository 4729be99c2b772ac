"""One self-contained HTML page that shows what mining found: numbers, similarities, and communities to look at."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.files import write_atomic
from b3.mining.report_text import drop_shared, plain_text, shared_words, shorten

if TYPE_CHECKING:
    from PIL import Image

    from b3.mining.plan import BatchPlan

THUMBNAIL = 72
MOST_MEMBERS = 36
SAMPLE = 64
SERIES = (("positive", "own target", "#1f7a5c"), ("community", "in the community", "#c2501a"),
          ("random", "random", "#7b8794"))  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One data set of the page.

    Attributes:
        plan: its batch plan; `plan.report` must be complete.
        records: object with `query(i)` and `target(i)` returning items with `.text` and `.image` (None, or something
            with `open()`), and `__len__`; `name` and `family` are shown if present. None: numbers only.
        name: heading; default: the name of the records.
    """

    plan: BatchPlan
    records: Any = None
    name: str | None = None

    @property
    def title(self) -> str:
        return self.name or getattr(self.records, "name", None) or "Batch plan"


def write_report_html(path: str | os.PathLike[str], sections: Sequence[Section]) -> None:
    """Write the page for one or several data sets; pictures are embedded, nothing is loaded from elsewhere."""
    write_atomic(Path(path), render(sections))


def render(sections: Sequence[Section]) -> str:
    """The page as a string."""
    heading = sections[0].title if len(sections) == 1 else f"Mined batches of {len(sections)} data sets"
    parts = [f"<h1>{escape(heading)}</h1>"]
    if len(sections) > 1:
        parts.append(_overview(sections))
    for number, section in enumerate(sections):
        parts.append(_section(section, number, alone=len(sections) == 1))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _overview(sections: Sequence[Section]) -> str:
    rows = []
    for number, section in enumerate(sections):
        r = section.plan.report
        cells = [
            f"{r['n']:,}",
            f"{r['num_distinct_targets']:,}",
            str(r["community_size"]),
            f"[{r['window'][0]}, {r['window'][1]})",
            f"<b>{r['mined_negatives_per_query']:.2f}</b>",
            f"{r['random_mined_negatives_per_query']:.2f}",
            f"{100 * r['teacher_mass_captured']:.1f} %",
        ]
        link = f'<a href="#d{number}">{escape(section.title)}</a>'
        rows.append(f"<tr><th>{link}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = ["Data set", "Rows", "Distinct targets", "K", "Ranks", "Hard negatives a query", "at random", "Teacher mass"]
    return (
        "<table><thead><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead><tbody>" + "".join(rows)
        + "</tbody></table>"
    )  # fmt: skip


def _section(section: Section, number: int, alone: bool) -> str:
    plan, r = section.plan, section.plan.report
    facts = [
        getattr(section.records, "family", None),
        f"{r['n']:,} rows, {r['num_distinct_targets']:,} distinct targets",
        f"{r['num_communities']:,} communities of {r['community_size']}",
        f"ranks {r['window'][0]} to {r['window'][1] - 1}",
        f"{plan.manifest.get('partitioner')} on {plan.manifest.get('edges')} edges",
        f"teacher {plan.manifest['teacher']}" if plan.manifest.get("teacher") else None,
    ]
    parts = [
        f'<section id="d{number}">' + ("" if alone else f"<h2>{escape(section.title)}</h2>"),
        f'<p class="facts">{escape(" · ".join(str(f) for f in facts if f))}</p>',
        f'<div class="pair">{_numbers(r)}{_histogram(r["histogram"])}</div>',
        f'<p class="facts">{escape(_remarks(r))}</p>',
    ]
    if section.records is not None:
        parts.append(_contact_sheets(section))
    return "\n".join(parts) + "</section>"


def _numbers(r: dict[str, Any]) -> str:
    most = r["community_size"] - 1
    lines = [
        (f"Hard negatives a query, of {most} others", "mined_negatives_per_query", "{:.2f}", 1),
        ("Likely false negatives (ranked above the window)", "skipped_ranks_per_query", "{:.2f}", 1),
        ("Others with the same target", "duplicate_targets_in_community", "{:.3f}", 1),
        ("Teacher mass captured, %", "teacher_mass_captured", "{:.2f}", 100),
    ]
    rows = []
    for label, key, form, factor in lines:
        mined, chance = r[key] * factor, r[f"random_{key}"] * factor
        times = f"{mined / chance:.3g}×" if chance > 0 else ""
        rows.append(
            f"<tr><th>{label}</th><td><b>{form.format(mined)}</b></td><td>{form.format(chance)}</td><td>{times}</td></tr>"
        )
    return (
        "<table><thead><tr><th>In a community</th><th>mined</th><th>random</th><th></th></tr></thead><tbody>"
        + "".join(rows) + "</tbody></table>"
    )  # fmt: skip


def _remarks(r: dict[str, Any]) -> str:
    levels = r["hardness_percentiles"]
    remarks = [
        f"hard negatives a query by community: {levels['10']:.1f} at the 10th percentile, {levels['50']:.1f} median,"
        f" {levels['90']:.1f} at the 90th"
    ]
    if r["num_remainder"]:
        remarks.append(f"{r['num_remainder']} rows left over")
    if r.get("hard_negatives_missing"):
        remarks.append(f"{r['hard_negatives_missing']:,} drawn negatives missing (too few candidates)")
    total = sum(r["seconds"].values())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in r["seconds"].items() if seconds >= 0.05)
    remarks.append(f"mined in {total:.1f} s ({stages})" if stages else f"mined in {total:.1f} s")
    remarks.append(f"peak memory {r['peak_memory_bytes'] / 2**30:.2f} GiB")
    return " · ".join(remarks)


def _histogram(h: dict[str, Any]) -> str:
    """Inline SVG: density of the three kinds of similarity."""
    counts = np.array([h[key] for key, _, _ in SERIES], dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    seen = np.flatnonzero((shares > 5e-4).any(axis=0))
    if not seen.size:
        return ""
    low, high = max(0, seen[0] - 2), min(shares.shape[1], seen[-1] + 3)
    width, height, foot = 460.0, 170.0, 22.0
    x = np.linspace(0, width, high - low + 1)
    peak = shares[:, low:high].max()
    shapes, labels = [], []
    for row, (_, name, colour) in zip(shares[:, low:high], SERIES, strict=True):
        if not row.any():
            continue
        y = height - row / peak * (height - 24)
        steps = " ".join(f"{a:.1f},{v:.1f} {b:.1f},{v:.1f}" for a, b, v in zip(x[:-1], x[1:], y, strict=True))
        shapes.append(
            f'<polygon points="0,{height} {steps} {width},{height}" fill="{colour}" fill-opacity=".22"'
            f' stroke="{colour}" stroke-width="1.4"/>'
        )
        mean = -1 + 0.01 * (np.average(np.arange(low, high), weights=row) + 0.5)
        labels.append(f'<span><i style="background:{colour}"></i>{name} (mean {mean:.2f})</span>')
    step = next(s for s in (0.05, 0.1, 0.2, 0.5) if (high - low) * 0.01 / s <= 9)
    start, end = -1 + low * 0.01, -1 + high * 0.01
    ticks = []
    for tick in np.arange(np.ceil(start / step - 1e-9), np.floor(end / step + 1e-9) + 1) * step:
        at = (tick - start) / (end - start) * width
        if 8 < at < width - 8:
            ticks.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{height}" y2="{height + 4}" stroke="#9aa5b1"/>'
                         f'<text x="{at:.1f}" y="{height + 16}">{tick + 0:.2g}</text>')  # fmt: skip
    return (
        f'<figure><svg viewBox="0 0 {width:.0f} {height + foot:.0f}" role="img">' + "".join(shapes)
        + f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="#9aa5b1"/>' + "".join(ticks)
        + "</svg><figcaption>Teacher similarity of a query to targets: " + " ".join(labels) + "</figcaption></figure>"
    )  # fmt: skip


def _contact_sheets(section: Section) -> str:
    records, plan = section.records, section.plan
    examples = plan.report["examples"]
    rows = {int(row) for example in examples for row in example["rows"][:MOST_MEMBERS]}
    rows |= {int(row) for row in np.linspace(0, len(records) - 1, min(SAMPLE, len(records)))}
    shared = {
        side: shared_words(plain_text(getattr(records, side)(row).text) for row in sorted(rows))
        for side in ("query", "target")
    }
    sheets, seen = [], set()
    for example in examples:
        if example["community"] in seen:
            continue
        seen.add(example["community"])
        sheets.append(_sheet(records, example, shared, plan.report["community_size"]))
    return "\n".join(sheets)


def _sheet(records: Any, example: dict[str, Any], shared: dict[str, tuple[int, int]], size: int) -> str:
    cards = []
    for row, hits in list(zip(example["rows"], example["mined_negatives"], strict=True))[:MOST_MEMBERS]:
        query = _side(records.query(row), shared["query"])
        target = _side(records.target(row), shared["target"])
        cards.append(
            f'<div class="card"><div class="side">{query}</div><div class="side target">{target}</div>'
            f'<div class="hits">{hits} of {size - 1} hard</div></div>'
        )
    more = f" (first {MOST_MEMBERS} members)" if size > MOST_MEMBERS else ""
    return (
        f"<h3>Community at the {example['percentile']}th percentile of hardness{more}"
        f" <small>{example['mined_negatives_per_query']:.1f} hard negatives a query; each card: query above,"
        f' its target below</small></h3><div class="sheet">' + "".join(cards) + "</div>"
    )


def _side(item: Any, shared: tuple[int, int]) -> str:
    full = plain_text(item.text)
    text = drop_shared(full, shared)
    picture = _picture(item)
    if not text and not picture:
        text = full
    short = escape(shorten(text, 70 if picture else 120))
    title = f' title="{escape(shorten(full, 300))}"' if full else ""
    return picture + (f"<span{title}>{short}</span>" if short else "")


def _picture(item: Any) -> str:
    """The item's picture as an <img>, '' if it has none, a remark if it cannot be read."""
    from b3.errors import InputError

    if item.image is None:
        return ""
    try:
        data = base64.b64encode(thumbnail(_open(item.image))).decode()
    except (OSError, ValueError, SyntaxError, InputError):  # one bad picture must not cost the report
        return '<em class="bad">unreadable picture</em>'
    return f'<img alt="" src="data:image/png;base64,{data}">'


def _open(image: Any) -> Image.Image:
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return Image.open(image)
    opened: Image.Image = image.open() if hasattr(image, "open") else image
    return opened


def thumbnail(image: Image.Image) -> bytes:
    """PNG of at most 72 pixels a side and 128 colours, transparency laid over white."""
    from PIL import Image

    small = image.convert("RGBA")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    sheet = Image.new("RGBA", small.size, "white")
    sheet.alpha_composite(small)
    buffer = io.BytesIO()
    sheet.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;margin:0 0 12px}h2{font-size:20px;margin:44px 0 2px;padding-top:18px;border-top:1px solid #e4e7eb}
h3{font-size:15px;margin:26px 0 8px}h3 small{font-weight:400;color:#616e7c;margin-left:6px}
a{color:#1c5d99;text-decoration:none}.facts{color:#616e7c;font-size:13.5px;margin:2px 0 14px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid #edf0f2;vertical-align:top}
th{font-weight:400}th:first-child{text-align:left}thead th{color:#616e7c;font-size:12.5px}
.pair{display:flex;flex-wrap:wrap;gap:20px 48px;align-items:flex-start;margin:6px 0 10px}
figure{margin:0;flex:1 1 380px;max-width:500px}svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:#616e7c;text-anchor:middle}figcaption{font-size:12.5px;color:#616e7c}
figcaption span{margin-left:8px;white-space:nowrap}
figcaption i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:4px}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(124px,1fr));gap:8px}
.card{border:1px solid #e4e7eb;border-radius:6px;overflow:hidden;display:flex;flex-direction:column;
font-size:12px;line-height:1.35}
.side{padding:7px 8px;display:flex;flex-direction:column;align-items:center;gap:4px;text-align:center;
overflow-wrap:anywhere}
.side img{max-width:72px;max-height:72px}.target{background:#f1f7f4;flex:1;justify-content:center}
.side:not(.target){min-height:40px;justify-content:center}
.hits{font-size:11px;color:#9a4a1c;background:#fdf4ee;text-align:center;padding:2px}.bad{color:#9aa5b1}
""".replace("\n", "")
