"""One loader for all sources; bad rows and files are named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from b3.data.datasets import load_eval, load_pairs
from b3.data.images import FolderImages, ParquetImages, content_key, decode
from b3.data.items import Item
from b3.data.tables import embedded_teacher, list_subsets, split_source
from b3.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"), rows=24)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parquet_jsonl_and_hub_give_the_same_rows(data: Path, tmp_path: Path) -> None:
    images = str(data / "images.parquet")
    parquet = load_pairs(f"parquet:{data}", "pictures", image_dir=images)
    table = pq.read_table(data / "pictures" / "train-00000-of-00001.parquet")
    jsonl = load_pairs(f"jsonl:{write_jsonl(tmp_path / 'x.jsonl', table.to_pylist())}", "pictures", image_dir=images)
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: pictures\n  data_files:\n  - {split: train, path: pictures/train-*}\n---\n"
    )
    hub = load_pairs(f"hub:{data}", "pictures", image_dir=images)
    keys = [[(q.key, t.key) for q, t in d] for d in (parquet, jsonl, hub)]
    assert keys[0] == keys[1] == keys[2]
    assert parquet.fingerprint() == jsonl.fingerprint() == hub.fingerprint()


def test_fingerprint_sees_every_change(data: Path) -> None:
    base = load_pairs(f"parquet:{data}", "words")
    assert base.fingerprint() == load_pairs(f"parquet:{data}", "words").fingerprint()
    assert base.fingerprint() != load_pairs(f"parquet:{data}", "words", max_rows=23).fingerprint()
    changed = base._columns["pos_text"].to_pylist()
    changed[7] += "!"
    other = type(base)("words", pa.table({**base._columns, "pos_text": changed}))
    assert base.fingerprint() != other.fingerprint()


def test_a_fingerprint_is_computed_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_pairs(f"parquet:{data}", "words")
    first = dataset.fingerprint()
    monkeypatch.setattr(dataset, "_columns", {})
    assert dataset.fingerprint() == first


def test_folder_and_parquet_images_are_the_same_images(data: Path, tmp_path: Path) -> None:
    packed = ParquetImages(data / "images.parquet")
    for row in pq.read_table(data / "images.parquet").to_pylist():
        (tmp_path / row["path"]).write_bytes(row["bytes"])
    folder = FolderImages(tmp_path)
    for name in ("0000.png", "0017.png", "0023.png"):
        assert packed.read(name) == folder.read(name)
        assert content_key(decode(packed.read(name), name)) == content_key(decode(folder.read(name), name))
    for store in (packed, folder):
        with pytest.raises(DataError, match=r"image 'x\.png' is not in"):
            store.read("x.png")


def test_a_path_out_of_the_image_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    with pytest.raises(DataError, match="leaves the image directory"):
        FolderImages(tmp_path / "in").read("../secret.png")


def test_negatives_as_a_string_or_a_list() -> None:
    base = {"qry": ["q"], "qry_image_path": [""], "pos_text": ["p"], "pos_image_path": [""]}
    from b3.data.datasets import PairDataset

    single = PairDataset("x", pa.table({**base, "neg_text": ["n"], "neg_image_path": [""]}), target_prefix="T: ")
    several = PairDataset("x", pa.table({**base, "neg_text": [["n", "", "m"]], "neg_image_path": [["", "", ""]]}))
    assert single.negatives(0) == [Item("T: n")]
    assert several.negatives(0) == [Item("n"), Item("m")]
    assert PairDataset("x", pa.table(base)).negatives(0) == []


PAIR = {"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {**PAIR, "qry": " "}], "row 1: the query has neither text nor image"),
        ([PAIR, PAIR, {**PAIR, "pos_text": None}], "row 2: the target has neither"),
        ([{"qry": "q"}], "missing; found qry; expected"),
        ([{**PAIR, "qry": 3}], "column qry has type int64"),
        ([{**PAIR, "qry_image_path": "a.png"}], "give image_dir, the folder of the images"),
        ([{**PAIR, "neg_text": "n"}], "go together"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_pairs(f"jsonl:{write_jsonl(tmp_path / 'bad.jsonl', rows)}", "bad")


def test_missing_things_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="subsets there: pictures, words"):
        load_pairs(f"parquet:{data}", "nothing")
    with pytest.raises(DataError, match=r"image_dir .* does not exist"):
        load_pairs(f"parquet:{data}", "pictures", image_dir=str(tmp_path / "none"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_pairs(f"parquet:{tmp_path / 'broken.parquet'}", "x")
    with pytest.raises(DataError, match="embedded data set 'x' does not exist; there is: emoji"):
        load_pairs("embedded:x", "y")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_pairs("hub:owner/never-existed", "y")
    with pytest.raises(DataError, match="not understood"):
        split_source("what.is.this")


@pytest.mark.parametrize("broken", [b"", b"not an image", None])
def test_broken_images_are_named(data: Path, broken: bytes | None) -> None:
    whole = ParquetImages(data / "images.parquet").read("0001.png")
    with pytest.raises(DataError, match=r"image a\.png does not decode"):
        decode(whole[: len(whole) // 2] if broken is None else broken, "a.png")


def test_embedded_data_is_the_same_code() -> None:
    subsets = list_subsets("embedded:emoji", "train")
    assert {"emoji_t2i", "emoji_i2t", "emoji_i2i", "emoji_cls", "emoji_vqa", "emoji_vg"} == set(subsets)
    for subset in subsets:
        pairs, rows = load_pairs("embedded:emoji", subset), load_eval("embedded:emoji", subset)
        queries, targets = embedded_teacher("emoji", subset)
        assert len(pairs) == len(queries) == len(targets) > 1000
        assert len(rows) >= 200
    image = load_pairs("embedded:emoji", "emoji_i2t").query(0).open_image()
    assert image is not None and image.size == (64, 64)
    assert load_pairs("embedded:emoji", "emoji_cls").target(0).text.startswith("Represent the class label: ")
    assert not load_pairs("embedded:emoji", "emoji_cls", prefix_targets=False).target(0).text.startswith("Represent")


def test_a_revision_pins_data_of_the_hub(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    import datasets

    asked = []
    original = datasets.load_dataset

    def load(name: str, subset: str, **options: object) -> object:
        asked.append((name, options.pop("revision")))
        return original("parquet", data_files=str(data / subset / "train-*.parquet"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub:some/data@a1b2c3", "some/data@a1b2c3", "hub:some/data"):
        assert len(load_pairs(source, "words")) == 24
    assert asked == [("some/data", "a1b2c3"), ("some/data", "a1b2c3"), ("some/data", None)]
