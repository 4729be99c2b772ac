"""The HTML page: self-contained, escaped, with pictures and readable texts."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mining import reference
from PIL import Image

from b3.mining import BatchPlan, mine
from b3.mining.report_html import THUMBNAIL, Section, render, thumbnail, write_report_html
from b3.mining.report_text import drop_shared, plain_text, shared_words, shorten


class Picture:
    def __init__(self, row: int, broken: bool = False) -> None:
        self.row, self.broken = row, broken

    def open(self) -> Image.Image:
        if self.broken:
            raise OSError("truncated")
        return Image.new("RGBA", (200, 100), (self.row % 256, 0, 0, 128))


class Records:
    name, family = "toys <b>", "retrieval"

    def __len__(self) -> int:
        return 60

    def query(self, row: int) -> Any:
        picture = None if row % 3 == 2 else Picture(row, broken=row % 3 == 1)
        return SimpleNamespace(text=f"<|image_1|>\nFind the toy: number {row} please", image=picture)

    def target(self, row: int) -> Any:
        return SimpleNamespace(text=f"<script>toy {row}</script>", image=None)


@pytest.fixture(scope="module")
def plan() -> BatchPlan:
    queries, targets = reference.clustered(60)
    return mine(queries, targets, p=2, m=10, community_size=10, teacher="toy & co")


def test_the_page_is_self_contained_and_escaped(plan: BatchPlan, tmp_path: Path) -> None:
    write_report_html(tmp_path / "page.html", [Section(plan, Records()), Section(plan, Records(), name="second")])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;toy" in page
    assert "toys &lt;b&gt;" in page and "toy &amp; co" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "second" in page and page.count("percentile of hardness") == 6
    assert "data:image/png;base64" in page and "unreadable picture" in page
    assert f"{plan.report['mined_negatives_per_query']:.2f}" in page


def test_texts_lose_placeholder_and_shared_instruction(plan: BatchPlan) -> None:
    page = render([Section(plan, Records())])
    spans = re.findall(r"<span title=[^>]*>([^<]*)</span>", page)
    assert any(re.fullmatch(r"\d+", s) for s in spans), "queries shrink to what differs"
    assert "image_1" not in page


def test_without_records_there_are_numbers_only(plan: BatchPlan) -> None:
    page = render([Section(plan)])
    assert "<svg" in page and "<img" not in page and "percentile of hardness" not in page


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "LA", "1"])
def test_thumbnails_are_small_pngs_on_white(mode: str) -> None:
    small = Image.open(io.BytesIO(thumbnail(Image.new(mode, (300, 200)))))
    assert small.format == "PNG" and max(small.size) <= THUMBNAIL
    clear = Image.open(io.BytesIO(thumbnail(Image.new("RGBA", (10, 10), (0, 0, 0, 0))))).convert("RGB")
    assert clear.getpixel((5, 5)) == (255, 255, 255)


def test_all_kinds_of_pictures_are_opened(plan: BatchPlan, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(file)
    for picture in (str(file), file, Image.new("RGB", (9, 9))):

        class Same(Records):
            image = picture

            def query(self, row: int) -> Any:
                return SimpleNamespace(text="<|image_1|> What is this?", image=self.image)

        page = render([Section(plan, Same())])
        assert "base64" in page and "unreadable" not in page
        assert ">What is this?<" not in page, "an instruction that all share is dropped where there is a picture"


def test_plan_of_labels_and_tiny_plan_render(plan: BatchPlan) -> None:
    queries, targets = reference.clustered(40, labels=8)
    for size in (1, 5, 40):
        assert "</html>" in render([Section(mine(queries, targets, p=1, m=4, community_size=size))])


def test_text_helpers() -> None:
    assert plain_text("<|image_1|>\nA  b<|im_end|>") == "A b"
    assert shared_words(["find a red one now", "find a blue one now"]) == (2, 2)
    assert shared_words(["same", "same"]) == (1, 0)
    assert shared_words(["a b a", "a b a b a"]) == (3, 0)
    assert shared_words(["alone here"]) == (0, 0) and shared_words(["", "x"]) == (0, 0)
    assert drop_shared("find a red one now", (2, 2)) == "red"
    assert drop_shared("same", (1, 0)) == ""
    assert shorten("one two three", 100) == "one two three"
    assert shorten("one two three", 9) == "one two…"
    assert len(shorten("x" * 50, 10)) == 10


def test_bins_cover_the_ends() -> None:
    from b3.mining.report import bins

    counts = bins(np.array([-1.0, 1.0, 0.999, 0.0]))
    assert counts[0] == 1 and counts[199] == 2 and counts[100] == 1 and counts.sum() == 4
