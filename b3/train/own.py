"""A recipe for a user's own pairs: a part is held out, and the numbers follow from how many rows there are.

    write(Path("pairs.jsonl"), Path("images"), Path("runs/own"))     # -> runs/own/recipe.yaml

The rules (`Numbers.of`) are meant to be read and changed: the recipe is a file like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from b3.data.datasets import load_pairs
from b3.data.formats import to_pairs
from b3.data.tables import PAIR_COLUMNS, check_rows, load_table
from b3.errors import DataError, RunError
from b3.files import atomic, write_text

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_ROWS = 64
MOST_HELD_OUT = 1000
# Models for those who name none: a text encoder of 22 M parameters, which is its own teacher; and the paper's.
TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
IMAGE_MODEL, IMAGE_TEACHER = "Qwen/Qwen2-VL-2B-Instruct", "TIGER-Lab/VLM2Vec-Qwen2VL-2B"


@dataclass(frozen=True, slots=True)
class Numbers:
    """What follows from the number of training rows."""

    k: int
    p: int
    m: int
    batch: int
    steps: int
    why: dict[str, str]

    @classmethod
    def of(cls, rows: int) -> Numbers:
        """Communities of 32 where there are at least 60 of them; a window of 5 % of the rows, at most the paper's."""
        k = 32 if rows >= 2000 else 16 if rows >= 800 else 8
        batch = 256 if rows >= 20_000 else 128 if rows >= 5000 else 64 if rows >= 800 else 32
        p, m = min(30, rows // 100), min(100, max(k, rows // 20))
        epochs = 3 if rows >= 20_000 else 5 if rows >= 2000 else 10
        steps = max(20, math.ceil(epochs * rows / batch))
        return cls(k, p, m, batch, steps, {
            "k": f"rows of a community; {rows // k} communities",
            "p": f"ranks skipped, 1 % of {rows:,} rows and at most 30: targets there may be right as well",
            "m": f"width of the window, 5 % of {rows:,} rows and at most 100",
            "batch": "mined batches of 64 do what random ones of 256 do (docs/evidence.md)",
            "steps": f"{epochs} epochs",
        })  # fmt: skip


def form_of(file: Path) -> str:
    """The format of a jsonl or parquet file by the keys of its first row."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            first: Any = pq.read_schema(file).names
        else:
            with file.open(encoding="utf-8") as lines:
                first = json.loads(next(line for line in lines if line.strip()))
    except (OSError, ValueError, StopIteration) as error:
        raise DataError(f"{file} cannot be read as jsonl ({error or 'no rows'}); see docs/data.md") from None
    marks = {"qry": "mmeb", "messages": "swift", "positive_passages": "tevatron", "positive_document_ids": "tevatron"}
    return next((form for key, form in marks.items() if key in first), "triplets")


def write(
    pairs: Path, images: Path | None, out: Path, model: str | None = None, teacher: str | None = None
) -> tuple[Path, Numbers, int]:
    """Split the pairs and write `out`/data and `out`/recipe.yaml.

    Returns (recipe, its numbers, rows held out). Raises `DataError` for data that cannot be used, `RunError` if there
    is a recipe of other pairs.
    """
    form, where = form_of(pairs), str(pairs)
    source = f"{'parquet' if pairs.suffix == '.parquet' else 'jsonl'}:{pairs}"
    load_pairs(
        source, pairs.stem, image_dir=None if images is None else str(images), form=form
    )  # its checks and messages
    table = check_rows(to_pairs(load_table(source, pairs.stem, "train"), form, where), PAIR_COLUMNS, where)
    if any("list" in str(table[name].type) for name in PAIR_COLUMNS):
        raise DataError(f"{pairs}: rows with lists of targets or images; write one target and one image a row")
    if table.num_rows < LEAST_ROWS:
        raise DataError(f"{pairs} has {table.num_rows} rows; at least {LEAST_ROWS} are needed to mine and to hold out")
    held_out, kept = split(table)
    numbers = Numbers.of(len(kept))
    has_images = any(value for name in ("qry_image_path", "pos_image_path") for value in table[name].to_pylist())
    recipe = out / "recipe.yaml"
    tree = tree_of(out, images, numbers, has_images, model, teacher)
    text = text_of(tree, numbers, pairs, len(kept), len(held_out))
    if recipe.is_file() and recipe.read_text().splitlines()[0] != text.splitlines()[0]:
        raise RunError(f"{recipe} is of other pairs; choose another --out or delete it")
    (out / "data").mkdir(parents=True, exist_ok=True)
    _write_table(table.take(kept), out / "data" / "train.parquet")
    _write_table(eval_rows(table, held_out), out / "data" / "held_out.parquet")
    if not recipe.is_file():  # one that was changed by hand stays
        write_text(recipe, text)
    return recipe, numbers, len(held_out)


def split(table: pa.Table) -> tuple[list[int], list[int]]:
    """(rows held out, rows kept): a tenth of the queries, at most 1,000 rows; equal queries stay on one side."""
    keys = [
        hashlib.sha256(f"{text}\0{path}".encode()).hexdigest()
        for text, path in zip(table["qry"].to_pylist(), table["qry_image_path"].to_pylist(), strict=True)
    ]
    most = min(MOST_HELD_OUT, max(1, len(keys) // 10))
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    held_out: list[int] = []
    for key in sorted(rows_of):  # by digest: at random, and the same every time
        if len(held_out) + len(rows_of[key]) <= most:
            held_out += rows_of[key]
    kept = sorted(set(range(len(keys))) - set(held_out))
    return sorted(held_out), kept


def eval_rows(table: pa.Table, rows: list[int]) -> pa.Table:
    """Rows in MMEB-eval's columns: candidates are the targets of all held-out rows, the row's own first.

    Targets that the data call right for the same query are left out of its candidates.
    """
    import pyarrow as pa

    columns = {name: table[name].to_pylist() for name in PAIR_COLUMNS}
    targets = list(zip(columns["pos_text"], columns["pos_image_path"], strict=True))
    queries = list(zip(columns["qry"], columns["qry_image_path"], strict=True))
    right: dict[Any, set[Any]] = {}
    for row in rows:
        right.setdefault(queries[row], set()).add(targets[row])
    pool = list(dict.fromkeys(targets[row] for row in rows))
    candidates = [[targets[row], *(t for t in pool if t not in right[queries[row]])] for row in rows]
    return pa.table(
        {
            "qry_text": [queries[row][0] for row in rows],
            "qry_img_path": [queries[row][1] for row in rows],
            "tgt_text": [[text for text, _ in row] for row in candidates],
            "tgt_img_path": [[path for _, path in row] for row in candidates],
        }
    )


def tree_of(
    out: Path, images: Path | None, numbers: Numbers, has_images: bool, model: str | None, teacher: str | None
) -> dict[str, Any]:
    """The recipe as a tree, without what is at its default."""
    import torch

    name = model or (IMAGE_MODEL if has_images else TEXT_MODEL)
    default_teacher = IMAGE_TEACHER if has_images and model is None else name
    store = str(images) if images is not None and has_images else None
    on_gpu = torch.cuda.is_available()
    trained: dict[str, Any] = {"dtype": "bfloat16" if on_gpu else "float32"}
    trained |= {} if has_images else {"train": "full"}
    return {
        "name": out.name,
        "output_dir": str(out / "run"),
        "model": {"name": name, **trained},
        "data": {
            "source": f"parquet:{out / 'data' / 'train.parquet'}",
            "image_dir": store,
            "prefix_targets": False,
            "datasets": [{"subset": "train", "family": "retrieval"}],
        },
        "mining": {
            "dir": str(out / "mining"), "teacher": teacher or default_teacher,
            "p": numbers.p, "m": numbers.m, "k": numbers.k,
        },
        "batch": {"size": numbers.batch, "policy": "b3"},
        "train": {
            "steps": numbers.steps, "lr": 1e-4 if has_images else 2e-5, "warmup_steps": numbers.steps // 10,
            "temperature": 0.02 if has_images else 0.05, "bf16": on_gpu, "chunk_tokens": 8192 if on_gpu else 2048,
            "save_every": max(20, numbers.steps // 4), "save_merged": has_images,
        },
        "eval": {
            "source": f"parquet:{out / 'data' / 'held_out.parquet'}", "image_dir": store, "subsets": ["held_out"],
            "prefix_targets": False,
        },
    }  # fmt: skip


def text_of(tree: dict[str, Any], numbers: Numbers, pairs: Path, kept: int, held_out: int) -> str:
    """YAML with the reasons; the first line says of which pairs."""
    digest = hashlib.sha256(pairs.read_bytes()).hexdigest()[:16]
    head = [f"# Of {pairs.resolve()} ({digest}): {kept:,} rows to train on, {held_out:,} held out."]
    head += [f"# {name}: {getattr(numbers, name)}, {why}" for name, why in numbers.why.items()]
    return "\n".join([*head, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)])


def _write_table(table: pa.Table, file: Path) -> None:
    import pyarrow.parquet as pq

    with atomic(file) as stream:
        pq.write_table(table, stream)
