"""The HTML page: self-contained, escaped, with images and readable texts."""

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

from b3.html import THUMBNAIL, drop_shared, plain_text, shared_words, shorten, thumbnail
from b3.mining import BatchPlan, mine
from b3.mining.page import MOST_MEMBERS, Section, render


class Drawing:
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
        image = None if row % 3 == 2 else Drawing(row, broken=row % 3 == 1)
        return SimpleNamespace(text=f"<|image_1|>\nFind the toy: number {row} please", image=image)

    def target(self, row: int) -> Any:
        return SimpleNamespace(text=f"<script>toy {row}</script>", image=None)


def section(plan: BatchPlan, records: Any = None, name: str | None = None) -> Section:
    return Section(plan.report, plan.manifest, records, name)


@pytest.fixture(scope="module")
def plan() -> BatchPlan:
    queries, targets = reference.clustered(60)
    return mine(queries, targets, p=2, m=10, community_size=10, teacher="toy & co", compare=True)


def test_the_page_is_self_contained_and_escaped(plan: BatchPlan) -> None:
    page = render([section(plan, Records()), section(plan, Records(), name="second")])
    assert "<script" not in page and "&lt;script&gt;toy" in page
    assert "toys &lt;b&gt;" in page and "toy &amp; co" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "second" in page and page.count("percentile of hardness") == 6
    assert "data:image/png;base64" in page and "unreadable image" in page
    assert f"{plan.report['mined_negatives_per_query']:.2f}" in page


def test_texts_lose_placeholder_and_shared_instruction(plan: BatchPlan) -> None:
    page = render([section(plan, Records())])
    spans = re.findall(r"<span title=[^>]*>([^<]*)</span>", page)
    assert any(re.fullmatch(r"\d+", s) for s in spans), "queries shrink to what differs"
    assert "image_1" not in page


def test_without_records_there_are_numbers_only(plan: BatchPlan) -> None:
    page = render([section(plan)])
    assert "<svg" in page and "<img" not in page and "percentile of hardness" not in page
    pair = plan.report["likely_false_negatives"][0]
    rows = [f"query of row {pair['row']}", f"target of row {pair['row']}", f"target of row {pair['other_row']}"]
    assert all(f">{row}<" in page for row in rows)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "LA", "1"])
def test_thumbnails_are_small_pngs_on_white(mode: str) -> None:
    small = Image.open(io.BytesIO(thumbnail(Image.new(mode, (300, 200)))[1]))
    assert small.format == "PNG" and max(small.size) <= THUMBNAIL
    clear = Image.open(io.BytesIO(thumbnail(Image.new("RGBA", (10, 10), (0, 0, 0, 0)))[1])).convert("RGB")
    assert clear.getpixel((5, 5)) == (255, 255, 255)


def test_all_kinds_of_images_are_opened(plan: BatchPlan, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(file)
    for original in (str(file), file, Image.new("RGB", (9, 9))):

        class Same(Records):
            image = original

            def query(self, row: int) -> Any:
                return SimpleNamespace(text="<|image_1|> What is this?", image=self.image)

        page = render([section(plan, Same())])
        assert "base64" in page and "unreadable" not in page
        assert ">What is this?<" not in page, "an instruction that all share is dropped where there is a image"


def text_of(page: str) -> str:
    """What a reader sees: without tags, on one line."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def table(page: str) -> list[list[str]]:
    """Cells of the first table of numbers, head first."""
    body = re.search(r"<table[^>]*>(.*?)</table>", page, re.DOTALL)
    assert body
    lines = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", line, re.DOTALL)] for line in lines]


def test_the_numbers_stand_beside_the_papers_recipe_and_random(plan: BatchPlan) -> None:
    r = plan.report
    head, *lines = table(render([section(plan)]))
    assert head == ["In a community of this plan", "mined", "paper's recipe", "random"]
    forms = {
        "mined_negatives_per_query": "{:.2f}", "teacher_mass_captured": "{:.2%}", "skipped_ranks_per_query": "{:.2f}",
        "negatives_above_positive_per_query": "{:.2f}", "queries_with_negatives_above_positive": "{:.1%}",
        "duplicate_targets_in_community": "{:.3f}",
    }  # fmt: skip
    for line, (key, form) in zip(lines, forms.items(), strict=True):
        expected = [form.format(r[prefix + key]).replace("%", " %") for prefix in ("", "paper_", "random_")]
        assert line[1:] == expected, key
    papers = mine(*reference.clustered(60), p=2, m=10, community_size=10, partitioner="paper")
    assert table(render([section(papers)]))[0] == ["In a community of this plan", "mined", "random"]


def test_contents_lead_to_every_data_set(plan: BatchPlan) -> None:
    page = render([section(plan, Records()), section(plan, name="second & last"), section(plan, name="third")])
    links = re.findall(r'<a [^>]*href="#([^"]*)"', page)
    assert set(links) == {"top", "d0", "d1", "d2"} and links[:3] == ["d0", "d1", "d2"]
    assert all(page.count(f'id="{link}"') == 1 for link in set(links))
    assert '<a href="#d1">second &amp; last</a>' in page
    assert "<a " not in render([section(plan)]), "one data set needs no contents"


def test_terms_are_explained_before_they_are_used(plan: BatchPlan) -> None:
    page = render([section(plan)])
    intro, rest = page.split('<section id="d0">')
    for term in ("Teacher", "Window, hard negative", "Community", "Likely false negative", "Teacher mass captured"):
        assert f"<dt>{term}</dt>" in intro and f"<dt>{term}</dt>" not in rest
    assert rest.count("<figure>") == rest.count("</svg>") == 2


def test_likely_false_negatives_are_shown() -> None:
    queries, targets = reference.clustered(60, labels=20, noise=1.6)
    plan = mine(queries, targets, p=2, m=10, community_size=15, hard_negatives=3)
    page = render([section(plan, Records())])
    pairs = plan.report["likely_false_negatives"]
    assert len(pairs) > 2
    seen = text_of(page)
    for pair in pairs:
        ranks = [f"rank {pair[key]}" if pair[key] is not None else "beyond rank 11" for key in pair if "rank" in key]
        own = f"{pair['row']}&lt;/script&gt; similarity {round(pair['positive_score'], 2) + 0:.2f}, {ranks[0]}"
        other = f"{pair['other_row']}&lt;/script&gt; similarity {round(pair['negative_score'], 2) + 0:.2f}, {ranks[1]}"
        assert f"{own} {other}" in seen, "without the word that all targets start with"
    share = plan.report["queries_with_negatives_above_positive"]
    assert f"For {100 * share:.1f} % of the queries" in seen


def test_texts_get_wide_cards_and_long_ones_are_cut(plan: BatchPlan) -> None:
    class Words(Records):
        def query(self, row: int) -> Any:
            return SimpleNamespace(text=f"word{row}", image=None)

        def target(self, row: int) -> Any:
            return SimpleNamespace(text=f"meaning{row} " + f"of word{row} " * 500, image=None)

    page = render([section(plan, Words())])
    assert 'class="sheet texts"' in page and 'class="triples texts"' in page
    assert 'class="sheet"' not in page and "<img" not in page
    spans = re.findall(r"<span[^>]*>(meaning[^<]*)</span>", page)
    assert len(spans) > 30 and 150 < max(map(len, spans)) <= 200
    assert 'class="sheet"' in render([section(plan, Records())])


def test_photographs_become_jpegs_and_drawings_stay_pngs() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    for image, kind in ((noise.resize((60, 60)), "jpeg"), (Image.new("RGB", (80, 80), "red"), "png")):
        name, data = thumbnail(image)
        opened = Image.open(io.BytesIO(data))
        assert name == kind and opened.format == kind.upper() and max(opened.size) <= THUMBNAIL


def test_a_page_of_the_worst_images_stays_light() -> None:
    """Noise does not compress; the communities are as large as are shown, and all that can be shown is."""
    rng = np.random.default_rng(0)
    pool = [Image.fromarray(rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)) for _ in range(20)]

    class Noise:
        name = "noise"

        def __len__(self) -> int:
            return 20 * MOST_MEMBERS

        def query(self, row: int) -> Any:
            return SimpleNamespace(text="x" * 5000, image=pool[row % 20])

        target = query

    queries, targets = reference.clustered(len(Noise()), noise=1.5)
    plan = mine(queries, targets, p=5, m=50, community_size=MOST_MEMBERS)
    page = render([section(plan, Noise())])
    assert len(plan.report["likely_false_negatives"]) == 12 and page.count("<img") == 3 * 36 * 2 + 12 * 3
    assert len(page.encode()) < 1_500_000


def test_plan_of_labels_and_tiny_plan_render(plan: BatchPlan) -> None:
    queries, targets = reference.clustered(40, labels=8)
    for size in (1, 5, 40):
        assert "</html>" in render([section(mine(queries, targets, p=1, m=4, community_size=size))])


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


def test_histograms_cover_the_ends() -> None:
    from b3.mining.report import histogram_of

    counts = histogram_of(np.array([-1.0, 1.0, 0.999, 0.0]), -1, 200)
    assert counts[0] == 1 and counts[199] == 2 and counts[100] == 1 and counts.sum() == 4
