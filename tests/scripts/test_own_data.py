"""Own pairs in one command: what is held out, the recipe that is written, and the whole on the embedded images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from b3.__main__ import main
from b3.config import load_config
from b3.errors import DataError
from b3.train.own import Numbers, form_of, write


def write_pairs(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts(num_rows: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    words = [*tiny.COLOURS, *tiny.SHAPES]
    return [
        {"anchor": f"what is {i} ?", "positive": " ".join(rng.choice(words, 4)) + f" number {i}"}
        for i in range(num_rows)
    ]


def images(root: Path, num_rows: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(0), []
    (root / "images").mkdir(parents=True)
    for i in range(num_rows):
        colour, shape = tiny.COLOURS[rng.integers(8)], tiny.SHAPES[rng.integers(4)]
        (root / "images" / f"{i}.png").write_bytes(tiny.image(colour, shape, i))
        row = {"qry": tiny.QUERY, "qry_image_path": f"{i}.png", "pos_text": f"a {colour} {shape} {i}"}
        rows.append({**row, "pos_image_path": ""})
    return rows


@pytest.mark.parametrize("rows", [64, 799, 800, 2000, 20_000, 1_000_000])
def test_numbers_fit_each_other(rows: int) -> None:
    numbers = Numbers.of(rows)
    assert numbers.batch % numbers.k == 0 and numbers.batch <= rows and rows // numbers.k >= 8
    assert 0 <= numbers.p <= 30 and numbers.k <= numbers.m <= 100 and numbers.p + numbers.m < rows
    assert numbers.steps * numbers.batch >= 3 * rows


def test_equal_queries_stay_on_one_side_and_no_right_answer_is_a_candidate(tmp_path: Path) -> None:
    rows = [{"anchor": f"q{i // 2}", "positive": f"a{i}"} for i in range(400)]
    recipe, numbers, num_held_out = write(write_pairs(tmp_path / "pairs.jsonl", rows), None, tmp_path / "out")
    train, held_out = (pq.read_table(tmp_path / "out" / "data" / f"{n}.parquet") for n in ("train", "held_out"))
    assert num_held_out == held_out.num_rows == 40 and train.num_rows == 360
    assert not set(train["qry"].to_pylist()) & set(held_out["qry_text"].to_pylist())
    for query, candidates in zip(held_out["qry_text"].to_pylist(), held_out["tgt_text"].to_pylist(), strict=True):
        number = int(query[1:])
        right = {f"a{2 * number}", f"a{2 * number + 1}"}
        assert candidates[0] in right and not right & set(candidates[1:]) and len(candidates) == 39
    config = load_config(recipe)
    assert (config.mining.community_size, config.train.steps) == (numbers.k, numbers.steps)
    assert f"# k: {numbers.k}, rows of a community" in recipe.read_text()


def test_a_changed_recipe_stays_and_other_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", texts(100))
    arguments = ["train", "--pairs", str(pairs), "--out", str(tmp_path / "out"), "--recipe-only"]
    assert main(arguments) == 0
    recipe = tmp_path / "out" / "recipe.yaml"
    assert "  k 8: rows of a community; 11 communities" in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace("lr: 2.0e-05", "lr: 3.0e-05"))
    assert main(arguments) == 0 and load_config(recipe).train.lr == 3e-5
    write_pairs(pairs, texts(101))
    assert main(arguments) == 2 and "is of other pairs; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (texts(20), "has 20 rows; at least 64 are needed"),
        ([{"qry": "a", "qry_image_path": "x.png", "pos_text": "b", "pos_image_path": ""}] * 70, "give image_dir"),
        ([{"anchor": "a", "score": 1}], "a row of format triplets"),
        ([], "cannot be read as jsonl"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(write_pairs(tmp_path / "pairs.jsonl", rows), None, tmp_path / "out")


@pytest.mark.parametrize("key", ["qry", "messages", "positive_passages", "anchor"])
def test_the_format_is_told_by_the_first_row(tmp_path: Path, key: str) -> None:
    forms = {"qry": "mmeb", "messages": "swift", "positive_passages": "tevatron", "anchor": "triplets"}
    assert form_of(write_pairs(tmp_path / "x.jsonl", [{key: []}])) == forms[key]


def test_the_readmes_example_on_embedded_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A parquet file of pairs and one of images."""
    emoji = Path(__file__).parents[2] / "b3" / "data" / "emoji"
    arguments = ["--pairs", str(emoji / "train" / "emoji_i2t.parquet"), "--images", str(emoji / "images.parquet")]
    arguments += ["--out", str(tmp_path / "out"), "--model", str(tiny.write_model(tmp_path / "model"))]
    assert main(["train", *arguments, "--recipe-only"]) == 0
    config = load_config(tmp_path / "out" / "recipe.yaml")
    assert config.data.image_dir == str(emoji / "images.parquet") and config.mining.community_size == 32
    assert "332 rows are held out" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["text", "image"])
def test_from_pairs_to_search(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make = tiny.write_text_model if kind == "text" else tiny.write_model
    model = make(tmp_path / "model")
    rows = texts(80) if kind == "text" else images(tmp_path, 80)
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    arguments = ["--pairs", str(pairs), "--out", str(out), "--model", str(model), "--teacher", str(model)]
    arguments += ["--images", str(tmp_path / "images")] if kind == "image" else []
    assert main(["train", *arguments, "train.steps=2", "train.warmup_steps=0"]) == 0
    printed = capsys.readouterr().out
    assert "before " in printed and f"search: b3 search --index {out / 'index'}" in printed
    scores = [json.loads((out / "eval" / n / "summary.json").read_text())["mean"] for n in ("before", "after")]
    assert all(0 <= score <= 1 for score in scores)
    assert len((out / "index" / "rows.jsonl").read_text().splitlines()) == 80
    assert main(["search", "--index", str(out / "index"), "--query", "a red disc", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 10
