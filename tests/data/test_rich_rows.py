"""Rows with several images, videos, instructions, positives and negatives, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from b3.data.datasets import PairDataset, load_pairs
from b3.data.images import open_store
from b3.data.items import Item, Still, Video
from b3.errors import DataError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(6):
        (root / f"{number}.png").write_bytes(tiny.image("red", "disc", number))
    for name, count in (("clip", 3), ("empty", 0)):
        (root / name).mkdir()
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(tiny.image("blue", "bar", number))
    return root


ROW: dict[str, Any] = {"qry": "q", "qry_image_path": [], "pos_text": ["p"], "pos_image_path": [[]]}


def read(rows: list[dict[str, Any]], images: Path, tmp_path: Path, **options: Any) -> PairDataset:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(f"jsonl:{file}", "own", image_dir=str(images), **options)


def names(item: Item) -> list[str]:
    """The last part of each path, videos as those of their frames."""
    stills = [s for m in item.media for s in (m.frames if isinstance(m, Video) else (m,))]
    return [Path(s.source.path if hasattr(s.source, "path") else str(s.source)).name for s in stills]


def test_several_images_and_an_instruction(images: Path, tmp_path: Path) -> None:
    data = read(
        [
            {**ROW, "qry": "<|image_1|> or <|image_2|>", "qry_image_path": ["1.png", "0.png"],
             "qry_instruction": "find"},
            {**ROW, "pos_text": ["<|image_1|> and <|image_2|>"], "pos_image_path": [["2.png", "3.png"]],
             "pos_instruction": "show"},
        ],
        images, tmp_path,
    )  # fmt: skip
    first, second = data.query(0), data.target(1)
    assert (first.text, first.instruction, names(first)) == ("<|image_1|> or <|image_2|>", "find", ["1.png", "0.png"])
    assert (second.instruction, names(second)) == ("show", ["2.png", "3.png"])
    assert data.query(1) == Item("q") and data.target(0) == Item("p")
    assert [still.open().size for still in first.images] == [
        Still(images / name).open().size for name in ("1.png", "0.png")
    ]


def test_a_row_with_several_positives_is_several_pairs(images: Path, tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "qry": "r", "pos_text": ["a", "b", "<|image_1|>"], "pos_image_path": [[], [], ["4.png"]]}, ROW]
    data = read(rows, images, tmp_path)
    assert len(data) == 5 and data.most_positives == 3
    assert [data.query(i).text for i in range(5)] == ["q", "r", "r", "r", "q"]
    assert [data.target(i).text for i in range(5)] == ["p", "a", "b", "<|image_1|>", "p"]
    assert [[item.text for item in data.positives(i)] for i in (0, 2)] == [["p"], ["a", "b", "<|image_1|>"]]
    assert data.where(3) == "row 1, positive 2"
    assert data.column("pos_text") == ["p", "a", "b", "<|image_1|>", "p"] and data.column("qry")[3] == "r"
    assert len({data.fingerprint(), read(rows[:2], images, tmp_path).fingerprint()}) == 2


def test_negatives_of_any_number_with_images(images: Path, tmp_path: Path) -> None:
    rows = [
        {**ROW, "neg_text": ["a", "<|image_1|> b <|image_2|>", ""], "neg_image_path": [[], ["1.png", "2.png"], []]},
        {**ROW, "neg_text": [], "neg_image_path": []},
        {**ROW, "neg_text": ["", "c"], "neg_image_path": [["3.png"], []]},
    ]
    data = read(rows, images, tmp_path)
    found = [[(item.text, names(item)) for item in data.negatives(i)] for i in range(3)]
    assert found == [[("a", []), ("<|image_1|> b <|image_2|>", ["1.png", "2.png"])], [], [("", ["3.png"]), ("c", [])]]


def test_videos_as_folders_and_as_lists_of_frames(images: Path, tmp_path: Path) -> None:
    rows = [{**ROW, "qry": "<|video_1|>", "qry_video_path": "clip"}, {**ROW, "qry_video_path": None}]
    data = read(rows, images, tmp_path)
    assert isinstance(data.query(0).media[0], Video) and names(data.query(0)) == ["0.png", "1.png", "2.png"]
    assert data.query(1).media == ()
    rows = [{**ROW, "qry": "<|video_1|>", "qry_video_path": ["5.png", "1.png"]}, {**ROW, "qry_video_path": []}]
    data = read(rows, images, tmp_path)
    assert names(data.query(0)) == ["5.png", "1.png"] and data.query(1).media == ()


def test_parquet_and_jsonl_are_one(images: Path, tmp_path: Path) -> None:
    rows = [{**ROW, "qry_image_path": ["1.png", "2.png"], "pos_text": ["a", "b"], "pos_image_path": [["3.png"], []]}]
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    (tmp_path / "own.parquet").write_bytes(b"")
    pq.write_table(table, tmp_path / "own.parquet")
    one = read(rows, images, tmp_path)
    other = load_pairs(f"parquet:{tmp_path / 'own.parquet'}", "own", image_dir=str(images))
    assert one.fingerprint() == other.fingerprint()
    assert [(q.key, t.key) for q, t in one] == [(q.key, t.key) for q, t in other]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pos_text": ["a", "b"]}, "row 1: the target has 2 texts, 1 image paths; as many"),
        ({"pos_text": [], "pos_image_path": []}, "row 1: the target has neither text nor image"),
        ({"pos_text": ["a", " "], "pos_image_path": [[], []]}, "row 1: the target has neither text nor image"),
        ({"qry": "", "qry_image_path": []}, "row 1: the query has neither text nor image"),
        ({"neg_text": ["a"], "neg_image_path": [[], []]}, "row 1: the negative has 1 texts, 2 image paths"),
    ],
)
def test_rows_that_do_not_fit_are_named(images: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(
            [{**ROW, **({"neg_text": [], "neg_image_path": []} if "neg_text" in row else {})}, {**ROW, **row}],
            images,
            tmp_path,
        )


def test_a_list_of_queries_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a row has one query, a text"):
        read([{**ROW, "qry": ["a", "b"]}], images, tmp_path)


def test_a_video_that_is_not_there_names_its_row(images: Path, tmp_path: Path) -> None:
    data = read([{**ROW, "qry_video_path": "nothing"}], images, tmp_path)
    with pytest.raises(DataError, match=r"own row 0: video .*nothing does not exist"):
        data.query(0)
    pq.write_table(pa.table({"path": ["a"], "bytes": [b"b"]}), tmp_path / "packed.parquet")
    data = PairDataset("own", pa.table({name: [value] for name, value in {**ROW, "qry_video_path": "clip"}.items()}),
                       open_store(tmp_path / "packed.parquet"))  # fmt: skip
    with pytest.raises(DataError, match=r"own row 0: video 'clip' is a folder or a file, and .*packed.parquet holds"):
        data.query(0)
