"""Rows of other programs as pairs; an error shows what a row looks like."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from b3.config import load_config
from b3.config.schema import Format
from b3.data import jsonl, spool, tables
from b3.data.datasets import load_datasets, load_pairs
from b3.data.formats import EXAMPLES, FORMATS
from b3.errors import DataError


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        (folder / name).write_bytes(tiny.image(colour, "disc", 1))
    (folder / "v1").mkdir(exist_ok=True)  # a video: a folder of frames
    for number in range(3):
        (folder / "v1" / f"{number}.jpg").write_bytes(tiny.image("green", "bar", number))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder / 'rows.jsonl'}"


def load(folder: Path, form: str, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    data = load_pairs(write(folder, rows), "rows", image_dir=str(folder), form=form)
    shown = []
    for row in range(len(data)):
        items = [data.query(row), data.target(row), *data.negatives(row)]
        for item in items:
            item.open_image()
        shown.append(tuple((item.text, item.images[0].name if item.images else None) for item in items))
    return shown


def test_the_recipe_knows_the_formats() -> None:
    assert get_args(Format) == FORMATS == tuple(EXAMPLES)


EXPECTED = {
    "mmeb": [(("<|image_1|>\nWhat is it?", "a.jpg"), ("a cat", None))],
    "triplets": [(("a cat", None), ("a small cat", None), ("a dog", None), ("a car", None))],
    "swift": [(("<|image_1|>\nWhat is it?", "a.jpg"), ("a cat", None), ("<|image_1|>\na dog", "b.jpg"))],
    "tevatron": [(("a cat", None), ("Cats A small cat.", None), ("Dogs A dog.", None))],
    "llava_hound_caption": [(("<|video_1|>\nWhat happens?", None), ("A cat jumps.", None))],
    "llava_hound_video": [
        (
            ("Find a video that contains the following visual content: A cat jumps.", None),
            ("Understand the content of the provided video: <|video_1|>", None),
        )
    ],
    "llava_hound_qa": [
        (
            ("Answer a question based on the content of a video. <|video_1|>\nWhat happens?", None),
            ("A cat jumps.", None),
        )
    ],
    "vidore": [
        (
            ("Find a document image that matches the given query: Who wrote it?", None),
            ("<|image_1|> Understand the content of the provided document image.", "a.jpg"),
        )
    ],
    "vidore_qa": [(("<|image_1|> Who wrote it?", "a.jpg"), ("A poet", None))],
    "visrag": [
        (
            ("Find a document image that matches the given query: Who wrote it?", None),
            ("<|image_1|> Understand the content of the provided document image.", "a.jpg"),
        )
    ],
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_row_that_errors_show_is_read(tmp_path: Path, form: str) -> None:
    assert load(tmp_path, form, EXAMPLES[form]) == EXPECTED[form]


def test_negatives_may_be_a_list_or_absent(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "a", "negatives": ["x", "y"]},
        {"question": "r", "answer": "b", "negatives": []},
    ]
    texts = [tuple(text for text, _ in row) for row in load(tmp_path, "triplets", rows)]
    assert texts == [("q", "a", "x", "y"), ("r", "b")]
    assert [len(row) for row in load(tmp_path, "triplets", [{"anchor": "q", "positive": "a"}])] == [2]


def test_several_positives_are_several_rows(tmp_path: Path) -> None:
    passages = [{"docid": "1", "text": "a"}, {"docid": "2", "text": "b"}]
    rows = load(tmp_path, "tevatron", [{"query": "q", "positive_passages": passages, "negative_passages": ["c"]}])
    assert rows == [(("q", None), (text, None), ("c", None)) for text in "ab"]


def test_a_system_message_goes_before_the_users(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Find it."}, {"role": "user", "content": "<image>this"}]
    row = {"messages": messages, "images": ["a.jpg"], "positive_messages": [[{"role": "user", "content": "b"}]]}
    assert load(tmp_path, "swift", [row])[0][0] == ("Find it. <|image_1|>\nthis", "a.jpg")


def test_an_item_may_have_several_images(tmp_path: Path) -> None:
    negatives = [user("<image>x<image>y"), user("z")]
    row = {
        "messages": user("<image><image>which?"), "images": ["a.jpg", "b.jpg"], "positive_messages": [user("<image>")],
        "positive_images": [["b.jpg"]], "negative_messages": negatives, "negative_images": [["b.jpg", "a.jpg"], []],
    }  # fmt: skip
    other = {"messages": user("q"), "images": [], "positive_messages": [user("p")]}
    data = load_pairs(write(tmp_path, [row, other]), "rows", image_dir=str(tmp_path), form="swift")
    assert data.query(0).text == "<|image_1|>\n<|image_2|>\nwhich?" and data.query(1).text == "q"
    sides = [data.query(0), data.target(0), *data.negatives(0), data.query(1), data.target(1)]
    names = [[image.name for image in item.images] for item in sides]
    assert names == [["a.jpg", "b.jpg"], ["b.jpg"], ["b.jpg", "a.jpg"], [], [], []]
    assert [item.text for item in data.negatives(0)] == ["<|image_1|>\nx<|image_2|>\ny", "z"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("triplets", {"anchor": "a", "positive": "b", "label": 0.3}, "a column 'label' makes pairs of any degree"),
        ("triplets", {"anchor": "a", "positive": 3}, "'positive' is int, a text is needed"),
        ("triplets", {"anchor": "a"}, "an anchor and a positive are needed"),
        ("swift", {"query": "a"}, "no key 'messages'"),
        ("swift", {"messages": user("a")}, "no positive_messages"),
        (
            "swift",
            {"messages": user("<image>"), "positive_messages": [user("b")]},
            "1 <image> in the text and 0 images",
        ),
        ("swift", {"messages": user("a"), "positive_messages": [user("b")], "label": 0}, "label 0 makes no positive"),
        ("swift", {"messages": user("a"), "positive_messages": [user("b")], "videos": ["v.mp4"]}, "'videos' is not"),
        ("swift", {"messages": [{"role": "assistant", "content": "a"}], "positive_messages": []}, "role 'assistant'"),
        ("tevatron", {"query": "a", "positive_document_ids": ["1"]}, "positive_document_ids point into a corpus"),
        ("tevatron", {"query": "a", "positive_passages": []}, "no positive_passages"),
        ("tevatron", {"query": "a", "positive_passages": [{"docid": "1"}]}, "no key 'text'"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_one_that_does(
    tmp_path: Path, form: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, form, [row])
    assert f"row 0: {message}" in str(caught.value)
    assert str(caught.value).endswith(f"a row of format {form}: {json.dumps(EXAMPLES[form][0], ensure_ascii=False)}")


@pytest.mark.parametrize("kind", ["swift", "tevatron", "llava_hound_caption", "mmeb", "texts"])
def test_blocks_of_rows_are_what_the_rows_are(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    several = {
        "messages": user("<image><image>which?"), "images": ["a.jpg", "b.jpg"], "positive_messages": [user("<image>")],
        "positive_images": [["b.jpg"]], "negative_messages": [user("<image>x<image>y"), user("z")],
        "negative_images": [["b.jpg", "a.jpg"], []],
    }  # fmt: skip
    lists = {"qry": "q", "qry_image_path": "", "pos_text": ["", "a"], "pos_image_path": ["a.jpg", ""]}
    day = {"qry": "2020-01-01", "qry_image_path": None, "pos_text": "2021", "pos_image_path": "", "n": 1}
    rows = {
        "texts": [day, {**day, "qry": "no day", "n": 0.5}, {"pos_image_path": "", "pos_text": "p", "qry": "q"}],
        "swift": [{"messages": user("q"), "positive_messages": [user("p"), user("r")]}, several, EXAMPLES["swift"][0]],
        "mmeb": [lists, {**lists, "pos_text": ["c"], "pos_image_path": [""]}],
    }.get(kind) or EXAMPLES[kind] * 3
    form = "mmeb" if kind == "texts" else kind
    arguments: dict[str, Any] = {"image_dir": str(tmp_path), "form": form}
    whole = load_pairs(write(tmp_path, rows), "rows", **arguments)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 1)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 1)
    monkeypatch.setattr(spool, "MEMORY_BYTES", 0)
    parts = load_pairs(write(tmp_path, rows), "rows", **arguments)
    assert len(parts) == len(whole) > 2 and parts.fingerprint() == whole.fingerprint()
    for row in range(len(whole)):
        for side in ("query", "target", "negatives"):
            one, other = (repr(getattr(data, side)(row)) for data in (whole, parts))
            assert re.sub("0x[0-9a-f]+", "", one) == re.sub("0x[0-9a-f]+", "", other)
    broken = {"mmeb": {**lists, "pos_text": ["c"]}, "texts": {"qry": "q"}}.get(kind, {"query": "x"})
    with pytest.raises(DataError, match=f"row {len(rows)}: "):
        load_pairs(write(tmp_path, [*rows, broken]), "rows", **arguments)
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text() + "\n\nnull\n")
    with pytest.raises(DataError, match=rf"line {len(rows) + 4} is no JSON object \(null\)"):
        load_pairs(f"jsonl:{file}", "rows", **arguments)


def test_many_parquet_files_and_a_packed_jsonl_are_one_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"qry": f"q{i}", "qry_image_path": "", "pos_text": f"p{i}", "pos_image_path": ""} for i in range(10)]
    whole = load_pairs(write(tmp_path, rows), "rows")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    for part in range(3):
        pq.write_table(pa.Table.from_pylist(rows[4 * part : 4 * part + 4]), tmp_path / f"part-{part}.parquet")
    monkeypatch.setattr(tables, "BLOCK_ROWS", 3)
    for source in (f"parquet:{tmp_path}/part-*.parquet", str(tmp_path / "rows.jsonl.gz")):
        assert load_pairs(source, "rows").fingerprint() == whole.fingerprint()
        assert load_pairs(source, "rows", max_rows=7).column("qry") == [f"q{i}" for i in range(7)]


def test_a_recipe_reads_them(tmp_path: Path) -> None:
    source = write(tmp_path / "x", EXAMPLES["triplets"] * 3)
    data = {"source": source, "format": "triplets", "image_dir": None, "datasets": [{"subset": "rows"}]}
    (dataset,) = load_datasets(load_config(tiny.write_recipe(tmp_path, data=data)))
    assert len(dataset) == 3 and dataset.target(0).text == "a small cat" and dataset.has_negatives
    data |= {"format": "mmeb", "datasets": [{"subset": "rows", "format": "triplets"}]}
    (other,) = load_datasets(load_config(tiny.write_recipe(tmp_path, data=data)))
    assert other.fingerprint() == dataset.fingerprint()


def test_the_page_shows_the_rows_that_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for form, rows in EXAMPLES.items():
        assert f"`{form}`" in page and json.dumps(rows[0], ensure_ascii=False) in page
