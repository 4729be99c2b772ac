"""One self-contained HTML page that shows what mining found: numbers, similarities, and communities to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.files import write_text
from b3.mining.report_cards import THUMBNAIL as THUMBNAIL
from b3.mining.report_cards import Cards, contact_sheets, duplicate_table, false_negative_table, hub_cards, shown_rows
from b3.mining.report_cards import thumbnail as thumbnail
from b3.mining.report_figures import hub_figure, mass_figure, similarity_figure
from b3.mining.report_style import INTRODUCTION, STYLE
from b3.mining.report_text import percent

if TYPE_CHECKING:
    from b3.mining.plan import BatchPlan


@dataclass(frozen=True)
class Section:
    """One data set of the page.

    Attributes:
        plan: its batch plan; `plan.report` must be complete.
        records: object with `query(i)` and `target(i)` returning items with `.text` and `.image` (None, or something
            with `open()`), and `__len__`; `name` and `family` are shown if present. None: numbers and row numbers only.
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
    write_text(Path(path), render(sections))


def render(sections: Sequence[Section]) -> str:
    """The page as a string."""
    alone = len(sections) == 1
    heading = f"Mined batches: {sections[0].title}" if alone else f"Mined batches of {len(sections)} data sets"
    parts = [f'<h1 id="top">{escape(heading)}</h1>', INTRODUCTION]
    if not alone:
        parts.append(_contents(sections))
    for number, section in enumerate(sections):
        parts.append(_section(section, number, alone))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _contents(sections: Sequence[Section]) -> str:
    """The table of contents, with the main numbers of each data set."""
    rows = []
    for number, section in enumerate(sections):
        r = section.plan.report
        cells = [
            f"{r['n']:,}",
            f"{r['num_distinct_targets']:,}",
            str(r["community_size"]),
            _window(r),
            f"<b>{r['mined_negatives_per_query']:.2f}</b>",
            _number(r, "paper_mined_negatives_per_query", _two),
            f"{r['random_mined_negatives_per_query']:.2f}",
            percent(r["teacher_mass_captured"]),
            f"{r['skipped_ranks_per_query']:.2f}",
        ]
        link = f'<a href="#d{number}">{escape(section.title)}</a>'
        rows.append(f"<tr><th>{link}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = ["Contents", "Rows", "Distinct targets", "Community size", "Window", "Hard negatives a query",
            "paper's recipe", "random", "Teacher mass", "Above the window"]  # fmt: skip
    return (
        '<table class="contents"><thead><tr>' + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead><tbody>"
        + "".join(rows) + "</tbody></table>"
    )  # fmt: skip


def _window(r: dict[str, Any]) -> str:
    return f"{r['window'][0]} to {r['window'][1] - 1}"


def _two(number: float) -> str:
    return f"{number:.2f}"


def _number(r: dict[str, Any], key: str, form: Callable[[float], str]) -> str:
    """A number of the report, or a dash if this plan's report has none."""
    return form(r[key]) if key in r else "–"


def _section(section: Section, number: int, alone: bool) -> str:
    plan, r = section.plan, section.plan.report
    facts = [
        getattr(section.records, "family", None),
        f"{r['n']:,} rows, {r['num_distinct_targets']:,} distinct targets",
        f"{r['num_communities']:,} communities of {r['community_size']}",
        f"window: ranks {_window(r)}",
        f"partitioner {plan.manifest.get('partitioner')}, {plan.manifest.get('edges')} edges",
        f"teacher {plan.manifest['teacher']}" if plan.manifest.get("teacher") else None,
    ]
    top = "" if alone else f'<h2>{escape(section.title)} <a class="up" href="#top">back to the top</a></h2>'
    cards = Cards(section.records, shown_rows(r))
    return "\n".join(
        [
            f'<section id="d{number}">{top}',
            f'<p class="facts">{escape(" · ".join(str(f) for f in facts if f))}</p>',
            _numbers(r, plan.manifest.get("partitioner")),
            f'<p class="facts">{escape(_remarks(r))}</p>',
            _figures(r),
            _doubts(r, cards),
            _hubs(r, cards),
            "" if section.records is None else _communities(r, cards),
            "</section>",
        ]
    )


def _numbers(r: dict[str, Any], partitioner: str | None) -> str:
    most = r["community_size"] - 1
    more, fewer = "more is better", "fewer is better"
    lines: list[tuple[str, str, str, Callable[[float], str]]] = [
        (f"Hard negatives a query, of {most} others", more, "mined_negatives_per_query", _two),
        ("Teacher mass captured", more, "teacher_mass_captured", lambda share: percent(share, 2)),
        ("Likely false negatives: ranked above the window", fewer, "skipped_ranks_per_query", _two),
        ("Likely false negatives: scored above the own target", fewer, "negatives_above_positive_per_query", _two),
        ("Queries with a target scored above their own", fewer, "queries_with_negatives_above_positive", percent),
        ("Others with the same target", fewer, "duplicate_targets_in_community", lambda number: f"{number:.3f}"),
    ]
    compared = {"paper": "paper's recipe", "random": "random"}
    if "paper_teacher_mass_captured" not in r or partitioner == "paper":
        del compared["paper"]
    rows = []
    for label, hint, key, form in lines:
        if key not in r:
            continue
        cells = [f"<b>{form(r[key])}</b>", *(_number(r, f"{name}_{key}", form) for name in compared)]
        rows.append(f"<tr><th>{label} <small>{hint}</small></th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = ["In a community of this plan", "mined", *compared.values()]
    return (
        "<table><thead><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead><tbody>" + "".join(rows)
        + "</tbody></table>"
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


def _figures(r: dict[str, Any]) -> str:
    similarity = similarity_figure(
        r["histogram"],
        "Height: share of pairs. The further the orange curve lies right of the grey one, the harder the batches;"
        " where it overlaps the green one, the teacher cannot tell negatives from right answers.",
    )
    mass = ""
    if "teacher_mass_histogram" in r:
        paper = f", the paper's recipe {_number(r, 'paper_teacher_mass_captured', percent)}"
        mass = mass_figure(
            r["teacher_mass_histogram"],
            f"The higher a curve stays towards the right, the better. On average a query meets"
            f" {percent(r['teacher_mass_captured'])} of the teacher mass of its {r['community_size'] - 1} hardest"
            f" negatives{paper if 'paper_teacher_mass_captured' in r else ''},"
            f" a random community {percent(r['random_teacher_mass_captured'])}.",
        )
    return f'<div class="pair">{similarity}{mass}</div>'


def _doubts(r: dict[str, Any], cards: Cards) -> str:
    """Likely false negatives and duplicates."""
    if "likely_false_negatives" not in r:
        return ""
    share, by = r["queries_with_negatives_above_positive"], r["negatives_above_positive_by"]
    text = (
        f"For {percent(share)} of the queries the teacher scores at least one other target of the community above the"
        f" query's own, by {by:.2f} on average. Some are right answers that the data does not list; others are pairs"
        " whose own target the teacher does not understand, or that are wrong in the data."
        if share
        else "In no community does the teacher score another target above a query's own."
    )
    parts = [f"<h3>Likely false negatives</h3><p>{text}</p>"]
    if cards is not None:
        pairs, copies = r["likely_false_negatives"], r["duplicate_examples"]
        if pairs:
            parts.append(f"<p>The {len(pairs)} largest differences, each query and each target once:</p>")
            parts.append(false_negative_table(cards, pairs, r["window"][1]))
        if copies:
            parts.append("<p>Members with the same target; training does not count them as each other's negatives:</p>")
            parts.append(duplicate_table(cards, copies))
    return "\n".join(parts)


def _hubs(r: dict[str, Any], cards: Cards) -> str:
    if "hubs" not in r:
        return ""
    h = r["hubs"]
    few = max(1, -(-r["num_distinct_targets"] // 100))
    name = "most frequent target takes" if few == 1 else f"{few:,} most frequent targets (1\u00a0%) take"
    text = (
        f"Hubs are targets that are hard negatives of very many queries. Here the {name} {percent(h['top_share'])} of"
        f" all places in windows. A target is in {h['mean']:.1f} windows on average, 99\u00a0% of them are in at most"
        f" {h['p99']:,.0f}, the most frequent one is in {h['max']:,}; {percent(h['unused'])} are in none."
    )
    if "drawn_top_share" in h:
        text += f" Of the hard negatives drawn for single queries, {percent(h['drawn_top_share'])} are such hubs."
    reading = (
        "Height: number of targets. The further a tail reaches to the right, the more often the same few targets"
        " serve as negatives, whatever the query."
    )

    return "\n".join(
        [
            f"<h3>Hubs</h3><p>{text}</p>",
            hub_figure(h["histogram"], reading),
            f"<p>The {len(h['targets'])} targets in most windows, with their share of all queries:</p>",
            hub_cards(cards, h["targets"], r["n"]),
        ]
    )


def _communities(r: dict[str, Any], cards: Cards) -> str:
    return (
        "<h3>Communities to look at</h3><p>An easy, a typical and a hard community. Each card is one row: its query"
        " above, its target below, and how many of the other targets are hard negatives for that query. The members"
        " should be easy to confuse, yet no target should be a right answer to another member's query.</p>"
        + contact_sheets(cards, r)
    )  # fmt: skip
