"""The kit of all HTML pages: one style sheet, tables, tiles, plots, thumbnails and shortened texts.

A page is one file and loads nothing from elsewhere. Texts are escaped by whoever puts them into HTML.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from b3.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 72
PNG_BYTES = 3000  # drawings, which stay below, keep their sharp edges
BLUE, RED, GREEN, GREY = "#1c5d99", "#c8553d", "#3a7d44", "#7b8794"
Curve = tuple[str, list[float], list[float], str]  # label, steps, values, colour
_TOKEN = re.compile(r"<\|[^|<>]*\|>")


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; `body` is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of HTML cells; the first of a row is its header. `kind`: "numbers" aligns the others to the right."""
    lines = "".join(
        f"<tr><th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    header = "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>" if any(head) else ""
    return f'<div class="wide"><table class="{kind}"><thead>{header}</thead><tbody>{lines}</tbody></table></div>'


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """(label, value) pairs as a row of tiles."""
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for label, value in figures)
    return f'<div class="tiles">{cells}</div>'


def image_tag(image: Any, side: int = THUMBNAIL) -> str:
    """A thumbnail as an <img>; '' for None, a remark if it cannot be read: one bad image must not cost the page.

    `image`: a path, a PIL image, or something with `open()` that returns one.
    """
    from PIL import Image

    if image is None:
        return ""
    try:
        opened = Image.open(image) if isinstance(image, (str, os.PathLike)) else image
        kind, data = thumbnail(opened.open() if hasattr(opened, "open") else opened, side)
    except (OSError, ValueError, SyntaxError, InputError):
        return '<em class="bad">unreadable image</em>'
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> tuple[str, bytes]:
    """An image of at most `side` pixels per side, transparency laid over white, as ("png" or "jpeg", bytes).

    A PNG of 128 colours, or a JPEG where that is smaller and the PNG is large.
    """
    from PIL import Image

    small = image.convert("RGBA")
    small.thumbnail((side, side))
    sheet = Image.new("RGBA", small.size, "white")
    sheet.alpha_composite(small)
    opaque = sheet.convert("RGB")
    png, jpeg = io.BytesIO(), io.BytesIO()
    opaque.quantize(128).save(png, "PNG", optimize=True)
    opaque.save(jpeg, "JPEG", quality=75, optimize=True)
    if len(png.getvalue()) <= max(PNG_BYTES, len(jpeg.getvalue())):
        return "png", png.getvalue()
    return "jpeg", jpeg.getvalue()


def new_axes(x_label: str) -> Any:
    """Axes of matplotlib in the style of all pages; `figure` makes them HTML."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(5.2, 2.7), layout="constrained")
    FigureCanvasSVG(sheet)
    axes = sheet.subplots()
    axes.set_xlabel(x_label, fontsize=8, color="#616e7c")
    axes.tick_params(labelsize=8, colors="#616e7c")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.grid(axis="y", alpha=0.3)
    return axes


def figure(title: str, axes: Any, reading: str = "") -> str:
    """Axes as inline SVG under a title; `reading`, HTML, says how to read them."""
    from matplotlib import rc_context

    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # names inside the images must not clash, nor change
        axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    caption = f"<figcaption>{reading}</figcaption>" if reading else ""
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{text[text.index('<svg') :]}{caption}</figure>"


def line_plot(title: str, curves: list[Curve], smoothed: bool = True, zero: bool = False) -> str:
    """Curves over steps as inline SVG: single values pale, their running mean strong; '' without values.

    `smoothed` False: no running mean. `zero`: the axis starts at zero.
    """
    from matplotlib.ticker import MaxNLocator

    curves = [c for c in curves if c[1]]
    if not curves:
        return ""
    axes = new_axes("step")
    for label, steps, values, colour in curves:
        width = max(1, len(values) // 25)
        marker = "o" if len(values) < 3 else None
        if smoothed and width > 1:
            axes.plot(*_thinned(steps, values), color=colour, alpha=0.25, linewidth=0.8)
            values = running_mean(values, width)
        axes.plot(*_thinned(steps, values), color=colour, linewidth=1.5, label=label, marker=marker)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set(size=8, color="#616e7c")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.margins(x=0.02)
    if zero:
        axes.set_ylim(bottom=0)
    return figure(title, axes)


def _thinned(steps: list[float], values: list[float], most: int = 600) -> tuple[list[float], list[float]]:
    """At most `most` points, the last one among them; a page must not grow with the run."""
    stride = max(1, -(-len(steps) // most))
    return steps[::-1][::stride][::-1], values[::-1][::stride][::-1]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values at each point, over fewer at the start."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        result.append(total / min(index + 1, width))
    return result


def plain_text(text: str) -> str:
    """`text` on one line without image placeholders and other special tokens."""
    return " ".join(_TOKEN.sub(" ", text or "").split())


def shared_words(texts: Iterable[str]) -> tuple[int, int]:
    """How many words at the (start, end) all texts have in common: the instruction of the data set."""
    words = [text.split() for text in texts]
    if len(words) < 2:
        return 0, 0
    length = min(len(w) for w in words)
    first = words[0]
    start = 0
    while start < length and all(w[start] == first[start] for w in words):
        start += 1
    end = 0
    while end < length - start and all(w[-1 - end] == first[-1 - end] for w in words):
        end += 1
    return start, end


def drop_shared(text: str, shared: tuple[int, int]) -> str:
    """`text` without its first and last shared words."""
    words = text.split()
    return " ".join(words[shared[0] : len(words) - shared[1]])


def shorten(text: str, most: int) -> str:
    """At most `most` characters, cut at a word."""
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    return (cut[: cut.rfind(" ")] if " " in cut[most // 2 :] else cut).rstrip() + "…"


STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;background:#fff;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;margin:0 0 10px}h2{font-size:20px;margin:44px 0 6px;padding-top:18px;border-top:2px solid #cbd2d9}
h3{font-size:17px;margin:34px 0 4px}h4{font-size:14.5px;margin:22px 0 8px}
h4 small{font-weight:400;color:#616e7c;margin-left:6px}p{margin:6px 0 10px;max-width:860px}
a{color:#1c5d99;text-decoration:none}.up{font-size:12.5px;font-weight:400;margin-left:10px}
code{font:12.5px ui-monospace,Menlo,Consolas,monospace;color:#52606d}
pre{background:#f7f9fa;border-radius:8px;padding:14px 16px;font-size:12.5px;line-height:1.45;overflow-x:auto}
.facts{color:#616e7c;font-size:13.5px;margin:2px 0 14px;max-width:none}.bad{color:#7b8794}
.intro{background:#f5f7f9;border-radius:8px;padding:8px 18px;margin:0 0 20px;font-size:14px}
.intro p{max-width:none}dl{display:grid;grid-template-columns:170px 1fr;gap:4px 14px;margin:8px 0}
dt{font-weight:600}dd{margin:0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;margin:0 0 8px}
th,td{padding:5px 18px 5px 0;text-align:left;border-bottom:1px solid #edf0f2;vertical-align:top}
th{font-weight:400}thead th{color:#616e7c;font-size:12.5px;vertical-align:bottom}th small{color:#9aa5b1;margin-left:6px}
.numbers td,.numbers th{text-align:right}.numbers th:first-child{text-align:left}
.contents{width:100%}.contents th,.contents td{padding-right:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:16px 0 6px}
.tile{border:1px solid #e4e7eb;border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:#616e7c;font-size:12.5px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:22px 28px;margin-top:14px}
.pair{display:flex;flex-wrap:wrap;gap:20px 48px;align-items:flex-start;margin:18px 0 10px}
figure{margin:0}.pair figure{flex:1 1 380px;max-width:500px}svg{width:100%;height:auto;display:block;margin:2px 0}
figcaption{font-size:12.5px;color:#616e7c}figcaption b{color:#1f2933;font-size:13.5px}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(124px,1fr));gap:8px}
.card{border:1px solid #e4e7eb;border-radius:6px;overflow:hidden;display:flex;flex-direction:column;
font-size:12px;line-height:1.35}
.side{padding:7px 8px;display:flex;flex-direction:column;align-items:center;gap:4px;text-align:center;
overflow-wrap:anywhere}
.side img{max-width:78px;max-height:78px;padding:3px;background:#fff;border-radius:4px}.side small{color:#616e7c}
.target{background:#f1f7f4}.doubt{background:#fdf4ee}
.card .target{flex:1;justify-content:center}
.card .side:not(.target){min-height:40px;justify-content:center}
.sheet.texts{grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}
.texts .side{text-align:left;align-items:flex-start;padding:6px 10px}
.texts .card .target{justify-content:flex-start}.texts .card .side:not(.target){font-weight:600;min-height:0}
.triples{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;background:#e4e7eb;border:1px solid #e4e7eb;
border-radius:6px;overflow:hidden;font-size:12.5px;line-height:1.4;max-width:920px;margin:0 0 14px}
.triples>*{background:#fff;justify-content:center}.triples>b{padding:5px 10px;font-weight:600;text-align:center}
.triples.texts>.side{text-align:left;align-items:flex-start;padding:7px 12px}
.triples>.target{background:#f1f7f4}.triples>.doubt{background:#fdf4ee}
.hits{font-size:11px;color:#9a4a1c;background:#fdf4ee;text-align:center;padding:2px}
.error{border-top:1px solid #e4e7eb;padding:16px 0 14px}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px}
.panel{border-radius:6px;padding:10px 12px;background:#f5f7fa;overflow-wrap:anywhere}
.panel h3{font-size:12.5px;font-weight:600;margin:0 0 8px;color:#52606d}
.panel img{display:block;max-width:100%;margin:0 0 6px}.panel p{margin:0}
.frames{display:flex;flex-wrap:wrap;gap:3px;margin:0 0 6px}.panel .frames img{margin:0}
.right{background:#eef7f2}.wrong{background:#fdf1ea}
.next{font-size:13px;color:#616e7c;margin-top:10px}
.next ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:4px 0 0;padding:0}
.next li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
""".replace("\n", "")
