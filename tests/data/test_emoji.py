"""The committed emoji data set: complete, unchanged, free of leaks, with a teacher that is better than chance."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

import b3

ROOT = Path(b3.__file__).parent / "data" / "emoji"
FAMILIES = {
    "emoji_t2i": "retrieval",
    "emoji_i2t": "retrieval",
    "emoji_i2i": "retrieval",
    "emoji_cls": "classification",
    "emoji_vqa": "vqa",
    "emoji_vg": "grounding",
}
CANDIDATES = {"emoji_t2i": 50, "emoji_i2t": 50, "emoji_i2i": 50, "emoji_cls": 99, "emoji_vqa": 20, "emoji_vg": 20}
CONCEPT_SUBSETS = ("emoji_t2i", "emoji_i2t", "emoji_i2i", "emoji_cls")


@pytest.fixture(scope="module")
def described():
    return json.loads((ROOT / "dataset.json").read_text())


@pytest.fixture(scope="module")
def train():
    return {name: pq.read_table(ROOT / "train" / f"{name}.parquet") for name in FAMILIES}


@pytest.fixture(scope="module")
def test_rows():
    return {name: pq.read_table(ROOT / "test" / f"{name}.parquet").to_pylist() for name in FAMILIES}


@pytest.fixture(scope="module")
def images():
    table = pq.read_table(ROOT / "images.parquet")
    return dict(zip(table["path"].to_pylist(), table["bytes"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def teacher():
    return load_file(ROOT / "teacher.safetensors")


def rows_of(table):
    return list(zip(*(table[c].to_pylist() for c in table.column_names), strict=True))


def test_files_are_the_described_ones(described):
    found = {
        p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in ROOT.rglob("*")
        if p.suffix in (".parquet", ".safetensors")
    }
    assert found == described["sha256"]
    assert sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file()) <= 25_000_000


def test_described_subsets_match_the_tables(described, train, test_rows):
    assert {s["name"]: s["family"] for s in described["subsets"]} == FAMILIES
    for entry in described["subsets"]:
        name = entry["name"]
        assert entry["train_rows"] == train[name].num_rows
        assert entry["test_rows"] == len(test_rows[name]) >= 200
        assert entry["candidates"] == CANDIDATES[name]
    assert sum(t.num_rows for t in train.values()) > 10_000


def test_columns(train, images):
    for table in train.values():
        assert table.column_names == ["qry", "qry_image_path", "pos_text", "pos_image_path"]
        assert {str(t) for t in table.schema.types} == {"string"}
        assert not any(column.null_count for column in table.columns)
    for name in FAMILIES:
        schema = pq.read_schema(ROOT / "test" / f"{name}.parquet")
        assert schema.names == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
    groups = pq.ParquetFile(ROOT / "images.parquet").metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= 256
    assert groups.num_rows == len(images), "an image path occurs twice"


def test_image_paths_exist_and_placeholders_agree(train, test_rows, images):
    for name, table in train.items():
        for query, query_path, target, target_path in rows_of(table):
            for text, path in ((query, query_path), (target, target_path)):
                assert path == "" or path in images, f"{name}: {path}"
                assert text.startswith("<|image_1|>\n") == (path != "")
            assert query.endswith("\n")
    for rows in test_rows.values():
        for row in rows:
            pairs = [(row["qry_text"], row["qry_img_path"]), *zip(row["tgt_text"], row["tgt_img_path"], strict=True)]
            for text, path in pairs:
                assert path == "" or path in images
                assert text.startswith("<|image_1|>\n") == (path != "")


def test_every_image_is_used(train, test_rows, images):
    used = {p for t in train.values() for c in ("qry_image_path", "pos_image_path") for p in t[c].to_pylist()}
    used |= {p for rows in test_rows.values() for r in rows for p in (r["qry_img_path"], *r["tgt_img_path"])}
    assert images.keys() == used - {""}


def test_a_sample_of_images_decodes(images):
    sizes = {"google": {64}, "twitter": {64}, "scenes": {112, 168}, "crops": set(range(48, 57))}
    for path in sorted(images)[::40]:
        image = Image.open(io.BytesIO(images[path]))
        image.load()
        assert image.width == image.height
        assert image.width in sizes[path.split("/")[0]]
        assert np.ptp(np.asarray(image.convert("RGBA"))) > 0, f"{path} is blank"


def test_candidates_are_distinct(test_rows):
    for name, rows in test_rows.items():
        for row in rows:
            pairs = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
            assert len(pairs) == len(set(pairs)) == CANDIDATES[name]


def test_positive_is_first(test_rows):
    """Re-derived from the row itself where it says what is right."""
    for row in test_rows["emoji_i2i"]:
        vendor, code = row["qry_img_path"].split("/")
        other = "twitter" if vendor == "google" else "google"
        assert row["tgt_img_path"][0] == f"{other}/{code}"
        assert {p.split("/")[0] for p in row["tgt_img_path"]} == {other}
    caption_of = {r["qry_img_path"]: r["tgt_text"][0] for r in test_rows["emoji_i2t"]}
    for row in test_rows["emoji_t2i"]:
        caption = row["qry_text"].split("caption: ", 1)[1].strip()
        assert [caption_of[p] for p in row["tgt_img_path"]].index(caption) == 0
        assert sum(caption_of[p] == caption for p in row["tgt_img_path"]) == 1
    for row in test_rows["emoji_vg"]:
        scene = row["qry_img_path"].split("/")[1].split(".")[0]
        assert row["tgt_img_path"][0].startswith(f"crops/{scene}_")
    for row in test_rows["emoji_vqa"]:
        if row["qry_text"].strip().endswith("How many emoji are there?"):
            assert row["tgt_text"][0] in ("three", "four", "five")


def test_held_out_concepts_are_absent_from_train(described, train, test_rows, images):
    held = set(described["held_out_concepts"])
    assert 200 <= len(held) <= 300
    digest = {path: hashlib.sha256(data).hexdigest() for path, data in images.items()}
    held_looks = {digest[f"{vendor}/{code}.png"] for code in held for vendor in ("google", "twitter")}
    captions = {r["tgt_text"][0] for r in test_rows["emoji_i2t"]}
    assert len(captions) == len(held)
    for table in train.values():
        for query, query_path, target, target_path in rows_of(table):
            assert not {digest.get(query_path), digest.get(target_path)} & held_looks
            assert target not in captions
            assert query.split("caption: ", 1)[-1].strip() not in captions
    for name in CONCEPT_SUBSETS:
        for row in test_rows[name]:
            paths = {p for p in (row["qry_img_path"], row["tgt_img_path"][0]) if p}
            assert {Path(p).stem for p in paths} <= held


def test_no_test_query_in_train(train, test_rows, images):
    digest = {path: hashlib.sha256(data).hexdigest() for path, data in images.items()} | {"": ""}
    for name, table in train.items():
        known = {(text, digest[path]) for text, path, _, _ in rows_of(table)}
        assert not known & {(r["qry_text"], digest[r["qry_img_path"]]) for r in test_rows[name]}
    labels = set(train["emoji_cls"]["pos_text"].to_pylist())
    assert {r["tgt_text"][0] for r in test_rows["emoji_cls"]} <= labels
    assert set(test_rows["emoji_cls"][0]["tgt_text"]) == labels
    for name in ("emoji_vqa", "emoji_vg"):
        seen = set(train["emoji_vqa"]["qry_image_path"].to_pylist() + train["emoji_vg"]["qry_image_path"].to_pylist())
        assert not seen & {r["qry_img_path"] for r in test_rows[name]}


def test_train_pairs_are_distinct(train):
    for table in train.values():
        rows = rows_of(table)
        assert len(rows) == len(set(rows))


def test_teacher_arrays(train, teacher):
    vectors = teacher["vectors"]
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1.0, atol=2e-3)
    assert set(teacher) == {"vectors"} | {f"{name}/{side}" for name in FAMILIES for side in ("queries", "targets")}
    used = np.concatenate([teacher[key] for key in sorted(teacher) if key != "vectors"])
    assert used.dtype == np.int32
    assert np.array_equal(np.unique(used), np.arange(len(vectors)))
    for name, table in train.items():
        assert len(teacher[f"{name}/queries"]) == len(teacher[f"{name}/targets"]) == table.num_rows


def test_identical_items_share_a_vector(train, teacher, images):
    for name, table in train.items():
        for side, (text, path) in {
            "queries": ("qry", "qry_image_path"),
            "targets": ("pos_text", "pos_image_path"),
        }.items():
            index_of: dict[tuple[str, bytes], int] = {}
            items = zip(table[text].to_pylist(), table[path].to_pylist(), teacher[f"{name}/{side}"], strict=True)
            for item_text, item_path, index in items:
                assert index_of.setdefault((item_text, images.get(item_path, b"")), index) == index
            assert len(set(index_of.values())) == len(index_of), f"{name}/{side}: two items share a vector"


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("emoji_t2i", 0.6),
        ("emoji_i2t", 0.6),
        ("emoji_i2i", 0.5),
        ("emoji_cls", 0.6),
        ("emoji_vqa", 0.18),
        ("emoji_vg", 0.5),
    ],
)
def test_teacher_is_better_than_chance_and_imperfect(name, floor, teacher):
    queries, targets = teacher[f"{name}/queries"], teacher[f"{name}/targets"]
    pool = np.unique(targets)
    sample = np.random.default_rng(0).choice(len(queries), 400, replace=False)
    vectors = teacher["vectors"].astype(np.float32)
    scores = vectors[queries[sample]] @ vectors[pool].T
    own = scores[np.arange(len(sample)), np.searchsorted(pool, targets[sample])]
    better = (scores > own[:, None]).sum(1)
    assert (better < 10).mean() > floor > 1.4 * 10 / len(pool)
    assert (better < 1).mean() < 0.8
    shuffled = scores[np.arange(len(sample)), np.searchsorted(pool, np.roll(targets[sample], 7))]
    assert ((scores > shuffled[:, None]).sum(1) < 10).mean() < floor
