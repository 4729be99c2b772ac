"""Many files of rows, shards of webdataset, and rows that cost bytes, not objects."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from b3.data import spool
from b3.data.datasets import load_pairs
from b3.data.items import Item
from b3.data.own import read_rows
from b3.data.row_files import Columns
from b3.errors import DataError
from scripts import embed, search


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


PICTURES = [tiny.image(colour, "disc", i) for i, colour in enumerate(tiny.COLOURS)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three rows: image and text; image and JSON; a text alone."""
    write_shard(
        tmp_path / "s-0.tar",
        {
            "a/0001.jpg": PICTURES[0],
            "a/0001.txt": b"a red disc",
            "a/0002.json": json.dumps({"text": "green", "id": "g", "image": "elsewhere"}).encode(),
            "a/0002.cls": b"3",
            "a/0002.PNG": PICTURES[1],
        },
    )
    write_shard(tmp_path / "s-1.tar", {"0003.txt": "naïve".encode()})
    return tmp_path


def test_shards_are_rows_and_their_images_stay_there(shards: Path) -> None:
    data = read_rows(shards / "s-*.tar")
    assert [file.name for file in data.files] == ["s-0.tar", "s-1.tar"]
    assert list(data.shown) == [
        {"id": "a/0001", "text": "a red disc", "image": None},
        {"id": "g", "text": "green", "image": None},
        {"id": "0003", "text": "naïve", "image": None},
    ]
    assert [item.text for item in data.items] == ["<|image_1|>\na red disc", "<|image_1|>\ngreen", "naïve"]
    for row in range(2):
        still = pickle.loads(pickle.dumps(data.items[row])).images[0]
        assert still.source.store.read(still.source.path) == PICTURES[row]
    assert not data.items[2].media


def test_shards_are_embedded_and_searched(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "model")
    arguments = ["--model", str(model), "--max-pixels", "6272", "--workers", "1"]
    assert embed.main([*arguments, "--input", str(shards / "s-*.tar"), "--out", str(tmp_path / "index")]) == 0
    for row, picture in enumerate(PICTURES[:2]):
        (tmp_path / f"{row}.png").write_bytes(picture)
    rows = [
        {"id": "a/0001", "text": "a red disc", "image": "0.png"},
        {"id": "g", "text": "green", "image": "1.png"},
        {"id": "0003", "text": "naïve"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert embed.main([*arguments, "--input", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "same")]) == 0
    ours, same = (np.load(tmp_path / name / "embeddings.npy") for name in ("index", "same"))
    assert np.array_equal(ours, same)
    assert json.loads((tmp_path / "index" / "ids.json").read_text()) == ["a/0001", "g", "0003"]
    page = tmp_path / "page.html"
    assert search.main(["--index", str(tmp_path / "index"), "--query", "naïve", "--html", str(page)]) == 0
    assert page.read_text().count("data:image/png;base64,") == 2
    capsys.readouterr()
    write_shard(shards / "s-1.tar", {"0003.txt": b"other"})
    assert embed.main([*arguments, "--input", str(shards / "s-*.tar"), "--out", str(tmp_path / "index")]) == 2
    assert "input.sha256 was" in capsys.readouterr().err


def test_the_page_shows_how_shards_become_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    for i in range(2):
        write_shard(Path(f"shards/{i}.tar"), {f"a/{i}.jpg": PICTURES[i], f"a/{i}.txt": f"text {i}".encode()})
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    exec(page.partition("## Millions of rows")[2].partition("```python\n")[2].partition("```")[0], {})
    data = load_pairs("jsonl:pairs.jsonl", "pairs", image_dir="images")
    assert [data.target(i).text for i in range(2)] == ["text 0", "text 1"]
    for i in range(2):
        assert data.query(i).open_image().size == Item("", PICTURES[i]).open_image().size


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"x", "1.png": b"y"}, r"row 0 \(1\) cannot be read \(it has several images, jpg, png; name"),
        ({"1.json": b"[1]"}, r"row 0 \(1\) cannot be read \(1\.json is not an object\)"),
        ({"1.json": b"{"}, r"row 0 \(1\) cannot be read"),
        ({"1.txt": b"\xff"}, r"row 0 \(1\) cannot be read \('utf-8'"),
        ({"1.cls": b"3"}, r"row 0 \(1\): neither text nor image"),
        ({"1.txt": b"x", "2.cls": b"", "1.json": b"{}"}, r"row 1 \(2\): neither text"),
        ({"1.txt": b"x", "2.txt": b"y", "1.jpg": b"z"}, r"row 2 \(1\): repeats the 'id' '1' of row 0 \(1\)"),
        ({"README": b"x"}, "has no rows"),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write_shard(tmp_path / "s.tar", members))


def test_a_torn_or_packed_shard_is_refused(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "s.tar", {"1.txt": b"x" * 3000, "2.txt": b"y" * 3000}).read_bytes()
    for size in (100, 2000, 5000, 7000):
        (tmp_path / "s.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"s\.tar cannot be read as an uncompressed tar archive"):
            read_rows(tmp_path / "s.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"z\.tar cannot be read as an uncompressed tar archive"):
        read_rows(tmp_path / "z.tar")


def test_the_ending_names_the_image_and_the_text(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", {"1.jpg": PICTURES[0], "1.seg.png": PICTURES[1], "1.caption": b"c"})
    item = read_rows(shard, Columns(text="caption", image="seg.png")).items[0]
    assert item.text == "<|image_1|>\nc" and item.images[0].source.store.read("") == PICTURES[1]


def test_many_files_are_one_list(tmp_path: Path) -> None:
    for part in range(3):
        rows: dict[str, list[Any]] = {"text": [f"{part} {i}" for i in range(4)], "id": [4 * part + i for i in range(4)]}
        pq.write_table(pa.table(rows), tmp_path / f"p-{part}.parquet", row_group_size=3)
    data = read_rows(tmp_path / "p-*.parquet")
    assert [row["text"] for row in data.shown] == [f"{part} {i}" for part in range(3) for i in range(4)]
    assert data.ids == list(range(12))
    (tmp_path / "p-1.parquet").rename(tmp_path / "p-3.parquet")
    pq.write_table(pa.table({"text": ["x"], "id": [2]}), tmp_path / "p-4.parquet")
    with pytest.raises(DataError, match=r"p-4\.parquet: row 0: repeats the 'id' 2 of row 2 of .*p-0\.parquet"):
        read_rows(tmp_path / "p-*.parquet")
    with pytest.raises(DataError, match="does not exist; give a file or a pattern"):
        read_rows(tmp_path / "q-*.parquet")


def test_rows_beyond_a_limit_lie_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path / "spool"))
    monkeypatch.setattr(spool, "BLOCK_ROWS", 7)
    (tmp_path / "spool").mkdir()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}", "id": f"r{i}" if i % 3 else i}) + "\n" for i in range(50)))
    small = read_rows(file)
    expected = list(zip(small.shown, small.items, strict=True))
    monkeypatch.setattr(spool, "MEMORY_BYTES", 500)
    opened = []
    monkeypatch.setattr(pa, "memory_map", lambda name, kept=pa.memory_map: opened.append(name) or kept(name))
    data = read_rows(file)
    assert list(zip(data.shown, data.items, strict=True)) == expected
    assert len(opened) == 1 and not list((tmp_path / "spool").iterdir())
    file.write_text(file.read_text() + "{")
    with pytest.raises(DataError, match="is not JSON"):
        read_rows(file)
    assert not list((tmp_path / "spool").iterdir())


def test_a_row_costs_no_objects(tmp_path: Path) -> None:
    """What Python allocates for four times the rows: nothing per row that is read, 16 bytes per id that is compared."""

    def held(rows: int) -> tuple[int, int]:
        file = tmp_path / f"{rows}.jsonl"
        file.write_text("".join(json.dumps({"text": f"text {i}", "id": f"row {i}"}) + "\n" for i in range(rows)))
        tracemalloc.start()
        try:
            data = read_rows(file)
            now, peak = tracemalloc.get_traced_memory()
            assert len(data) == rows
            return now, peak
        finally:
            tracemalloc.stop()

    held(100)  # what is imported and cached
    few, many = held(10_000), held(40_000)
    assert (many[0] - few[0]) / 30_000 < 1
    assert (many[1] - few[1]) / 30_000 < 130
