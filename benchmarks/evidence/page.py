"""docs/evidence.md: the prose of page.md with tables and plots from the committed results in its places."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.evidence import tables
from benchmarks.evidence.grid import HERE
from benchmarks.evidence.results import Results

IMAGES = "images"
_PLACE = re.compile(r"^\{\{(.+)\}\}$", re.MULTILINE)


def write_page(results: Results, docs: Path) -> None:
    """Fill the places of page.md: ``{{pivot question key=value ...}}``, and so on with listing, by_part
    and plot.

    Values are those of the functions in `benchmarks.evidence.tables`; a comma makes a list, ``a:b,c:d`` a table; a
    text with a blank in it is left alone.
    """
    makers: dict[str, Callable[..., str]] = {
        "pivot": lambda question, **given: tables.pivot(results, question, **given),
        "listing": lambda question, **given: tables.listing(results, question, **_listed(given)),
        "by_part": lambda question, **given: tables.by_part(results, question, **_listed(given)),
        "plot": lambda question, **given: _plot(results, docs, question, **given),
        "machine": lambda: results.machine,
        "runs": lambda: str(len(results.runs)),
    }

    def fill(match: re.Match[str]) -> str:
        kind, *words = shlex.split(match[1])
        plain = [w for w in words if "=" not in w]
        given = {key: _value(text) for key, _, text in (w.partition("=") for w in words if "=" in w)}
        return makers[kind](*plain, **given)

    (docs / "evidence.md").write_text(_PLACE.sub(fill, (HERE / "page.md").read_text()))


def _listed(given: dict[str, Any]) -> dict[str, Any]:
    several = ("axes", "controls", "facts", "shared", "arms")
    return {key: [value] if key in several and isinstance(value, str) else value for key, value in given.items()}


def _plot(results: Results, docs: Path, question: str, **given: Any) -> str:
    file = Path(IMAGES) / f"{given.pop('file')}.png"
    title = given.get("title", "")
    tables.plot_lines(results, question, path=docs / file, **given)
    return f"![{title}]({file})"


def _value(text: str) -> Any:
    if " " in text:
        return text
    if ":" in text:
        return {key: _value(value) for key, _, value in (part.partition(":") for part in text.split(","))}
    if "," in text:
        return [_value(part) for part in text.split(",") if part]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text, text)
