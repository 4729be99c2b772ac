"""A user's own rows: read, embed once, search."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from processes import run_python

from b3.data.items import Item
from b3.data.own import instructed, prompt, read_rows
from b3.data.row_files import Columns
from b3.errors import DataError
from scripts import embed, search

PIXELS = ("--max-pixels", "6272")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A text, an image, both, and an image as base64."""
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(["red", "blue"]):
        (tmp_path / "pictures" / f"{colour}.png").write_bytes(tiny.image(colour, "disc", i))
    packed = base64.b64encode(tiny.image("green", "bar", 7)).decode()
    return write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"id": "a", "text": "a red disc"},
            {"id": "b", "image": "pictures/red.png"},
            {"id": "c", "image": "pictures/blue.png", "text": "what is it?"},
            {"id": "d", "image_base64": f"data:image/png;base64,{packed}", "text": "<|image_1|>\na bar"},
            {"id": "e", "text": "a blue <b> frame number 12", "image": None},
        ],
    )


def run_embed(model: Path, rows: Path, out: Path, *more: str) -> int:
    return embed.main(["--model", str(model), "--input", str(rows), "--out", str(out), *PIXELS, *more])


@pytest.fixture
def index(model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run_embed(model, rows, tmp_path / "index") == 0
    capsys.readouterr()
    return tmp_path / "index"


def test_rows_become_items_with_placeholder_and_instruction(rows: Path) -> None:
    data = read_rows(rows, instruction="Find it:")
    assert data.ids == ["a", "b", "c", "d", "e"]
    assert [item.text for item in data.items][:4] == [
        "Find it: a red disc",
        "<|image_1|>\nFind it:",
        "<|image_1|>\nFind it: what is it?",
        "<|image_1|>\nFind it: a bar",
    ]
    assert prompt("x <|image_1|> y", True) == "x <|image_1|> y"
    assert prompt("", True, "Represent it.\n") == "<|image_1|>\nRepresent it.\n"
    assert prompt("x", False, "Represent it:\n") == "Represent it:\nx"
    assert data.shown[2]["image"] == str(rows.parent / "pictures" / "blue.png")
    assert data.shown[3]["image"] is None
    again = pickle.loads(pickle.dumps(data.items[3]))  # as for a worker process
    assert again.open_image().size == data.items[3].open_image().size


def test_parquet_holds_images_as_bytes_or_struct(rows: Path, tmp_path: Path) -> None:
    images = [tiny.image("red", "disc", i) for i in range(5)]
    texts = ["x"] * 5 + ["only a text"]
    pq.write_table(pa.table({"t": texts, "p": [*images, None]}), tmp_path / "bytes.parquet", row_group_size=2)
    struct = [{"bytes": p, "path": None} for p in images[:4]] + [{"bytes": None, "path": "pictures/red.png"}, None]
    pq.write_table(pa.table({"t": texts, "p": struct, "n": range(6)}), tmp_path / "struct.parquet", row_group_size=4)
    plain = read_rows(tmp_path / "bytes.parquet", Columns(text="t", image="p"))
    structs = read_rows(tmp_path / "struct.parquet", Columns(text="t", image="p", id="n"))
    assert plain.ids == structs.ids == list(range(6))
    assert plain.items[5].image is structs.items[5].image is None
    for i in range(4):
        one, two = plain.items[i].open_image(), structs.items[i].open_image()
        assert one is not None
        assert two is not None
        assert one.tobytes() == two.tobytes()
    assert structs.shown[4]["image"] == str(tmp_path / "pictures" / "red.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "row 1 (line 2) is not JSON"),
        ("[1]", "row 1 (line 2) is not an object"),
        ('{"text": " "}', "row 1 (line 2): neither text nor image"),
        ('{"text": 3}', "row 1 (line 2): 'text' is int"),
        ('{"image": "none.png"}', "row 1 (line 2): image 'none.png' is not in"),
        ('{"image_base64": "%%%"}', "row 1 (line 2): image_base64 is not base64"),
        ('{"text": "x", "id": 1}', "row 1 (line 2): an 'id', unlike"),
        ('{"text": "<|image_1|><|image_1|>", "image": "rows.jsonl"}', "row 1 (line 2): the text has 2 image"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2 \(line 3\): repeats the 'id' 'x' of row 0"):
        read_rows(write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "id": i} for i in ("x", "y", "x")]))
    with pytest.raises(DataError, match="has no rows"):
        read_rows(write_jsonl(tmp_path / "b.jsonl", []))
    with pytest.raises(DataError, match=r"is none of \.jsonl, \.parquet, \.tar"):
        read_rows(write_jsonl(tmp_path / "c.csv", []))
    pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="found caption; name them with --text-column"):
        read_rows(tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"e\.parquet cannot be read as parquet"):
        read_rows(tmp_path / "e.parquet")


def test_a_broken_image_names_its_row(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.png").write_bytes(tiny.image("red", "bar", 0)[:60])
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "good"}, {"image": "bad.png"}])
    assert run_embed(model, rows, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "'bad.png' of row 1 (line 2) in" in error
    assert "does not decode" in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_folder_holds_what_was_asked_for(index: Path, model: Path, rows: Path) -> None:
    vectors = np.load(index / "embeddings.npy")
    assert vectors.shape == (5, 32)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert json.loads((index / "ids.json").read_text()) == ["a", "b", "c", "d", "e"]
    manifest = json.loads((index / "manifest.json").read_text())
    assert manifest["rows"] == 5
    assert manifest["model"]["name"] == str(model)
    assert len(manifest["input"]["sha256"]) == 64
    assert sorted(p.name for p in index.iterdir()) == ["embeddings.npy", "ids.json", "manifest.json", "rows.jsonl"]
    from b3 import Embedder

    embedder = Embedder.from_pretrained(model, dtype="float32", max_pixels=6272)
    expected = embedder.encode([{"text": "<|image_1|>\n", "image": rows.parent / "pictures" / "red.png"}])
    assert np.allclose(expected[0], vectors[1], atol=1e-5)


def test_two_ranks_write_the_same_bytes(index: Path, model: Path, rows: Path, tmp_path: Path) -> None:
    arguments = ["--model", model, "--input", rows, "--out", tmp_path / "two", *PIXELS]
    run_python("scripts/embed.py", *arguments, ranks=2, timeout=300)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in index.iterdir())
    for name in ("embeddings.npy", "ids.json", "rows.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (index / name).read_bytes()


def test_a_second_run_does_nothing_and_other_options_are_refused(
    index: Path, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (index / "embeddings.npy").stat().st_mtime_ns
    assert run_embed(model, rows, index) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run_embed(model, rows, index, "--no-normalize") == 2
    assert "options.normalize was True, now False" in capsys.readouterr().err
    other = shutil.copytree(model, tmp_path / "other")
    assert run_embed(other, rows, index) == 2
    assert "holds another index (model.name was" in capsys.readouterr().err
    with rows.open("a") as file:
        file.write('{"id": "f", "text": "one more"}\n')
    assert run_embed(model, rows, index) == 2
    assert "input.sha256 was" in capsys.readouterr().err
    assert (index / "embeddings.npy").stat().st_mtime_ns == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert run_embed(model, rows, tmp_path / "full") == 2
    assert "holds other files (thesis.txt)" in capsys.readouterr().err


def test_a_folder_without_its_vectors_is_made_again(index: Path, model: Path, rows: Path) -> None:
    before = np.load(index / "embeddings.npy")
    (index / "embeddings.npy").unlink()
    assert run_embed(model, rows, index) == 0
    assert np.array_equal(before, np.load(index / "embeddings.npy"))


def test_an_interrupted_run_continues(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    from b3 import Embedder

    out = tmp_path / "index"
    with monkeypatch.context() as patched:
        patched.setattr(embed, "save_index", interrupt)
        assert run_embed(model, rows, out) == 130
    assert (out / ".partial").is_dir()
    monkeypatch.setattr(Embedder, "forward", None)  # nothing is left to encode
    assert run_embed(model, rows, out) == 0
    assert not (out / ".partial").exists()
    assert np.isfinite(np.load(out / "embeddings.npy")).all()


def first_id(printed: str) -> str:
    line = next(line for line in printed.splitlines() if line.split()[:1] == ["1"])
    return line.split()[2]


def test_search_finds_each_row_by_itself(index: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = index.parent / "results.html"
    arguments = ["--index", str(index), "--top", "3"]
    assert search.main([*arguments, "--query", "a red disc"]) == 0
    assert first_id(capsys.readouterr().out) == "a"
    red = str(rows.parent / "pictures" / "red.png")
    assert search.main([*arguments, "--query-image", red, "--html", str(page)]) == 0
    assert first_id(capsys.readouterr().out) == "b"
    assert search.main(["--index", str(index), "--queries", str(rows), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert [first_id(part) for part in printed.split("query: ")[1:]] == ["a", "b", "c", "d", "e"]
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 3 + 5 * 3  # of the queries, and of the results
    assert "unreadable" not in html
    assert "a blue &lt;b&gt; frame" in html and "<th>text</th>" in html
    assert "http" not in html
    assert "<th>text</th>" not in search.render(
        [("red", Item(""), [(0, 0.5)])], [{"id": "b", "text": "", "image": red}], {}
    )


def test_search_refuses_another_model_and_bad_input(
    index: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from b3.model.backbones.tiny import make_tiny_model

    other = make_tiny_model(tmp_path / "other", ["a b c"], hidden=32, layers=1, vision_layers=1, seed=1, vocab_size=300)
    assert search.main(["--index", str(index), "--query", "x", "--model", str(other)]) == 2
    assert "is not the one that made" in capsys.readouterr().err
    moved = shutil.copytree(model, tmp_path / "moved")
    assert search.main(["--index", str(index), "--query", "x", "--model", str(moved)]) == 0
    capsys.readouterr()
    for arguments, message in [
        (["--index", str(tmp_path), "--query", "x"], "no finished embeddings"),
        (["--index", str(index)], "give either"),
        (["--index", str(index), "--query", " "], "--query is empty"),
        (["--index", str(index), "--query-image", "none.png"], "does not exist"),
    ]:
        assert search.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_scripts_start_from_anywhere(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "search.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--queries" in done.stdout


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_fewer_bits_state_their_recall_and_find_the_same(
    model: Path, rows: Path, index: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / precision
    assert run_embed(model, rows, out, "--precision", precision) == 0
    assert f"{precision}: recall@4 against float32 is " in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recall"]["value"] == 1.0 and manifest["recall"]["queries"] == 5
    assert not (out / "embeddings.npy").exists() and np.load(out / "codes.npy").dtype == np.int8
    assert (out / "bits.npy").exists() == (precision == "binary")
    assert run_embed(model, rows, out, "--precision", precision) == 0 and "nothing to do" in capsys.readouterr().out
    assert run_embed(model, rows, out) == 2 and "options.precision" in capsys.readouterr().err
    answers = []
    for folder in (index, out):
        assert search.main(["--index", str(folder), "--query", "a red disc", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["results"])
    assert [hit["id"] for hit in answers[0]] == [hit["id"] for hit in answers[1]]
    assert answers[0][0]["score"] != answers[1][0]["score"]
    assert [h["score"] for h in answers[0]] == pytest.approx([h["score"] for h in answers[1]], abs=0.01)
    code = search.main(["--index", str(out), "--query", "a red disc", "--dim", "16"])
    assert code == (2 if precision == "binary" else 0)
    assert precision == "int8" or "embed the rows with --dim 16" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "has_image"), [("a cat", False), ("a cat", True), ("", True)])
def test_an_instruction_stands_where_the_prompt_rule_has_a_place(text: str, has_image: bool) -> None:
    read = Item(prompt(text, has_image), b"image" if has_image else None)
    placed = instructed(read, "Find it:", has_place=True)
    assert (placed.text, placed.media, placed.instruction) == (read.text, read.media, "Find it:")
    joined = instructed(read, "Find it:", has_place=False)
    assert joined.text == prompt(text, has_image, "Find it:") and joined.instruction is None
    assert instructed(read, "", has_place=True) == instructed(read, "", has_place=False) == read
