"""One self-contained HTML page that shows what mining found: numbers, similarities, and communities to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from b3 import html
from b3.console import num_bytes, percent
from b3.html import drop_shared, image_tag, plain_text, shared_words, shorten

GREEN, ORANGE, VIOLET, GREY = "#1f7a5c", "#c2501a", "#5b5fc7", "#7b8794"
# key in the report's histogram of similarity and of mass, label, colour
GROUPS = (("positive", "", "own target", GREEN), ("community", "mined", "in the community", ORANGE),
          ("paper", "paper", "paper's recipe", VIOLET), ("random", "random", "random community", GREY))  # fmt: skip
MOST_MEMBERS = 36
SAMPLE = 64
INTRODUCTION = """<div class="intro"><p>An embedding model is trained with batches of pairs: each <b>query</b> must find
its own <b>target</b> among the targets of all rows in its batch. Rows drawn at random make this too easy to learn
from. Mining therefore puts rows together that are hard to tell apart. This page shows how well that worked.</p>
<dl><dt>Teacher</dt><dd>the model whose similarities (cosine, from -1 to 1) rank all targets for each query; rank 0 is
the most similar one. The student plays no part.</dd>
<dt>Window, hard negative</dt><dd>the window is a range of those ranks. A target inside it is a hard negative of the
query: similar enough to be mistaken for the answer, ranked low enough to be most likely wrong.</dd>
<dt>Community</dt><dd>a group of rows, chosen so that the members' targets are hard negatives of each other's queries.
All communities have the same size, and a batch consists of whole ones.</dd>
<dt>Likely false negative</dt><dd>another member's target that the teacher ranks above the window, or scores above the
query's own target: it may well be a correct answer, and training would push it away.</dd>
<dt>Teacher mass captured</dt><dd>how close a query's community comes to the hardest possible one (100 %), whose other
members have the best-ranked targets of the window; near targets count far more than distant ones. The higher it is,
the closer training on the batch is to training on all rows at once (arXiv 2505.11293, Theorem 1).</dd></dl>
<p>A <b>good</b> plan has many more hard negatives and much more teacher mass than random communities and, if it is
compared (<code>report.compare</code>), than the paper's recipe (mutual edges, METIS with its defaults), and few
likely false negatives (harder communities always have somewhat more).</p></div>"""


@dataclass(frozen=True)
class Section:
    """One data set of the page.

    Attributes:
        report: what was measured of its plan (see `b3.mining.report`).
        manifest: what the plan was made from.
        records: object with `query(i)` and `target(i)` returning items with `.text` and `.image` (None, or something
            with `open()`), and `__len__`; `name` and `family` are shown if present. None: numbers and row numbers only.
        name: heading; default: the name of the records.
    """

    report: dict[str, Any]
    manifest: dict[str, Any]
    records: Any = None
    name: str | None = None

    @property
    def title(self) -> str:
        return self.name or getattr(self.records, "name", None) or "Batch plan"


def render(sections: Sequence[Section]) -> str:
    """The page of one or several data sets; images are embedded, nothing is loaded from elsewhere."""
    alone = len(sections) == 1
    heading = f"Mined batches: {sections[0].title}" if alone else f"Mined batches of {len(sections)} data sets"
    parts = [f'<h1 id="top">{escape(heading)}</h1>', INTRODUCTION]
    if not alone:
        parts.append(_contents(sections))
    return html.page(heading, parts + [_section(section, number, alone) for number, section in enumerate(sections)])


def _contents(sections: Sequence[Section]) -> str:
    """The table of contents, with the main numbers of each data set."""
    compared = any("paper_mined_negatives_per_query" in section.report for section in sections)
    rows = []
    for number, section in enumerate(sections):
        r = section.report
        rows.append(
            [
                f'<a href="#d{number}">{escape(section.title)}</a>',
                f"{r['n']:,}",
                f"{r['num_distinct_targets']:,}",
                str(r["community_size"]),
                _window(r),
                f"<b>{r['mined_negatives_per_query']:.2f}</b>",
                *([_number(r, "paper_mined_negatives_per_query", _two)] if compared else []),
                f"{r['random_mined_negatives_per_query']:.2f}",
                percent(r["teacher_mass_captured"]),
                f"{r['skipped_ranks_per_query']:.2f}",
            ]
        )
    papers = ["paper's recipe"] if compared else []
    head = ["Contents", "Rows", "Distinct targets", "Community size", "Window", "Hard negatives per query", *papers,
            "random communities", "Teacher mass", "Ranked above the window"]  # fmt: skip
    return html.table(head, rows, "numbers contents")


def _window(r: dict[str, Any]) -> str:
    return f"{r['window'][0]} to {r['window'][1] - 1}"


def _two(number: float) -> str:
    return f"{number:.2f}"


def _number(r: dict[str, Any], key: str, form: Callable[[float], str]) -> str:
    """A number of the report, or a dash if this plan's report has none."""
    return form(r[key]) if key in r else "–"


def _section(section: Section, number: int, alone: bool) -> str:
    r, manifest = section.report, section.manifest
    facts = [
        getattr(section.records, "family", None),
        f"{r['n']:,} rows, {r['num_distinct_targets']:,} distinct targets",
        f"{r['num_communities']:,} communities of {r['community_size']}",
        f"window: ranks {_window(r)}",
        f"partitioner {manifest.get('partitioner')}, {manifest.get('edges')} edges",
        f"teacher {manifest['teacher']}" if manifest.get("teacher") else None,
    ]
    top = "" if alone else f'<h2>{escape(section.title)} <a class="up" href="#top">back to the top</a></h2>'
    cards = Cards(section.records, shown_rows(r))
    return "\n".join(
        [
            f'<section id="d{number}">{top}',
            f'<p class="facts">{escape(" · ".join(str(f) for f in facts if f))}</p>',
            _numbers(r, manifest.get("partitioner")),
            f'<p class="facts">{escape(_remarks(r))}</p>',
            _figures(r),
            _false_negatives(r, cards),
            "" if section.records is None else _communities(r, cards),
            "</section>",
        ]
    )


def _numbers(r: dict[str, Any], partitioner: str | None) -> str:
    most = r["community_size"] - 1
    more, fewer = "more is better", "fewer is better"
    lines: list[tuple[str, str, str, Callable[[float], str]]] = [
        (f"Hard negatives per query, of {most} others", more, "mined_negatives_per_query", _two),
        ("Teacher mass captured", more, "teacher_mass_captured", lambda share: percent(share, 2)),
        ("Likely false negatives: ranked above the window", fewer, "skipped_ranks_per_query", _two),
        (
            "Likely false negatives: scored above the query's own target",
            fewer,
            "negatives_above_positive_per_query",
            _two,
        ),
        ("Queries with a target scored above their own", fewer, "queries_with_negatives_above_positive", percent),
        ("Others with the same target", fewer, "duplicate_targets_in_community", lambda number: f"{number:.3f}"),
    ]
    compared = {"paper": "paper's recipe", "random": "random"}
    if "paper_teacher_mass_captured" not in r or partitioner == "paper":
        del compared["paper"]
    rows = []
    for label, hint, key, form in lines:
        cells = [f"<b>{form(r[key])}</b>", *(_number(r, f"{name}_{key}", form) for name in compared)]
        rows.append([f"{label} <small>{hint}</small>", *cells])
    return html.table(["In a community of this plan", "mined", *compared.values()], rows, "numbers")


def _remarks(r: dict[str, Any]) -> str:
    levels = r["hardness_percentiles"]
    remarks = [
        f"hard negatives per query by community: {levels['10']:.1f} at the 10th percentile, {levels['50']:.1f} median,"
        f" {levels['90']:.1f} at the 90th"
    ]
    if r["num_remainder"]:
        remarks.append(f"{r['num_remainder']} rows left over")
    if r.get("hard_negatives_missing"):
        remarks.append(f"{r['hard_negatives_missing']:,} hard negatives missing (too few candidates)")
    total = sum(r["seconds"].values())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in r["seconds"].items() if seconds >= 0.05)
    remarks.append(f"mined in {total:.1f} s ({stages})" if stages else f"mined in {total:.1f} s")
    remarks.append(f"peak memory {num_bytes(r['peak_memory_bytes'])}")
    return " · ".join(remarks)


def _figures(r: dict[str, Any]) -> str:
    paper = "paper_teacher_mass_captured"
    similarity = similarity_figure(
        r["histogram"],
        "Cosine similarity; height: share of pairs. The further the orange curve lies to the right of the grey one, the"
        " harder the batches; where it overlaps the green one, the teacher cannot tell negatives from correct answers.",
    )
    mass = mass_figure(
        r["teacher_mass_histogram"],
        "The higher a curve stays towards the right, the better. On average a query's community has"
        f" {percent(r['teacher_mass_captured'])} of the teacher mass of its {r['community_size'] - 1} hardest negatives"
        f"{f', by the paper’s recipe {percent(r[paper])}' if paper in r else ''},"
        f" a random community {percent(r['random_teacher_mass_captured'])}.",
    )
    return f'<div class="pair">{similarity}{mass}</div>'


def similarity_figure(h: dict[str, Any], reading: str) -> str:
    """Share of the scores in each bin of 0.01, by group of ``report["histogram"]``."""
    axes = html.new_axes("similarity")
    edges = np.linspace(-1, 1, len(h["positive"]) + 1)
    spans = []
    for key, _, label, colour in GROUPS:
        if any(h.get(key, ())):
            shares = np.array(h[key]) / sum(h[key])
            mean = shares @ (edges[:-1] + edges[1:]) / 2
            label = f"{label} (mean {mean:.2f})"
            axes.stairs(
                shares,
                edges,
                fill=key != "paper",
                facecolor=(colour, 0.25),
                edgecolor=colour,
                linewidth=1.4,
                label=label,
            )
            spans += [edges[:-1][shares > 5e-4].min(), edges[1:][shares > 5e-4].max()]
    axes.set_xlim(min(spans) - 0.02, max(spans) + 0.02)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.set_yticks([])
    return html.figure("Similarity of a query to targets", axes, reading)


def mass_figure(h: dict[str, Any], reading: str) -> str:
    """Share of queries that capture at least so much of their teacher mass, of ``report["teacher_mass_histogram"]``."""
    axes = html.new_axes("teacher mass captured, %")
    highest = 10.0
    for _, key, label, colour in GROUPS:
        if any(h.get(key, ())):
            counts = np.array(h[key])
            shares = 100 * np.append(counts[::-1].cumsum()[::-1], 0) / counts.sum()
            at_least = np.linspace(0, 100, len(shares))
            axes.plot(at_least, shares, color=colour, label=label)
            highest = max(highest, at_least[shares > 0.2].max() + 4)
    axes.set_xlim(0, min(100, highest))  # nothing to see further right
    axes.set_ylim(0, 103)
    return html.figure("Share of queries, %, that capture at least so much teacher mass", axes, reading)


def _false_negatives(r: dict[str, Any], cards: Cards) -> str:
    share, by = r["queries_with_negatives_above_positive"], r["negatives_above_positive_by"]
    text = (
        f"For {percent(share)} of the queries the teacher scores at least one other target of the community above the"
        f" query's own, by {by:.2f} on average. Some are correct answers that the data does not list; for others the"
        " teacher does not understand the query's own target, or the pair is wrong in the data."
        if share
        else "In no community does the teacher score another target above a query's own."
    )
    parts, pairs, depth = [f"<h3>Likely false negatives</h3><p>{text}</p>"], r["likely_false_negatives"], r["window"][1]
    if pairs:
        parts.append(f"<p>The {len(pairs)} largest differences, each query and each target once:</p>")
        lines = ["<b>query</b><b>its own target</b><b>target of another member</b>"]
        for pair in pairs:
            own, other = (
                f"{cards.show('target', pair[row])}<small>similarity {round(pair[f'{side}_score'], 2) + 0:.2f},"
                f" {_rank(pair[f'{side}_rank'], depth)}</small>"
                for row, side in (("row", "positive"), ("other_row", "negative"))
            )
            lines.append(
                f'<div class="side">{cards.show("query", pair["row"])}</div><div class="side target">{own}</div>'
                f'<div class="side doubt">{other}</div>'
            )
        parts.append(f'<div class="triples{cards.layout}">{"".join(lines)}</div>')
    return "\n".join(parts)


def _rank(rank: int | None, depth: int) -> str:
    return f"beyond rank {depth - 1}" if rank is None else f"rank {rank}"


def _communities(r: dict[str, Any], cards: Cards) -> str:
    sheets = {example["community"]: _sheet(cards, example, r["community_size"]) for example in reversed(r["examples"])}
    return (
        "<h3>Example communities</h3><p>An easy, a typical and a hard community. Each card is a row: the query,"
        " below it its target, and how many of the other targets are hard negatives of the query. The members should be"
        " easy to confuse, yet no target should be a correct answer to another member's query.</p>"
        + "\n".join(reversed(sheets.values()))  # none twice
    )  # fmt: skip


class Cards:
    """Shows items of `records`, without the instruction that all of them share.

    Args:
        records: see `Section`; None: row numbers are shown.
        rows: rows that will be shown; with a sample of the others they tell what is shared.
    """

    def __init__(self, records: Any, rows: Iterable[int]) -> None:
        self.records = records
        self.shared: dict[str, tuple[int, int]] = {}
        self.has_images = False
        if records is None:
            return
        sample = {int(row) for row in rows}
        sample |= {int(row) for row in np.linspace(0, len(records) - 1, min(SAMPLE, len(records)))}
        for side in ("query", "target"):
            items = [getattr(records, side)(row) for row in sorted(sample)]
            self.shared[side] = shared_words(plain_text(item.text) for item in items)
            self.has_images |= any(item.image is not None for item in items)

    @property
    def layout(self) -> str:
        """Further class of grids: texts need wider cells than images."""
        return "" if self.has_images else " texts"

    def show(self, side: str, row: int) -> str:
        """Image and text of the "query" or "target" of a row."""
        if self.records is None:
            return f"<span>{side} of row {row:,}</span>"
        item = getattr(self.records, side)(row)
        full = plain_text(item.text)
        text = drop_shared(full, self.shared[side])
        image = image_tag(item.image)
        if not text and not image:
            text = full
        short = shorten(text, 70 if image else 120 if self.has_images else 200)
        title = f' title="{escape(shorten(full, 300))}"' if full and full != short else ""
        return image + (f"<span{title}>{escape(short)}</span>" if short else "")


def shown_rows(r: dict[str, Any]) -> set[int]:
    """Rows of which the report shows query or target."""
    rows = {int(row) for example in r["examples"] for row in example["rows"][:MOST_MEMBERS]}
    return rows | {pair[key] for pair in r["likely_false_negatives"] for key in ("row", "other_row")}


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
        f" <small>{example['mined_negatives_per_query']:.1f} hard negatives per query</small></h4>"
        f'<div class="sheet{cards.layout}">' + "".join(shown) + "</div>"
    )
