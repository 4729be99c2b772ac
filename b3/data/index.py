"""The folder of scripts/embed.py: the vectors of a user's rows, what a result shows, and what decided them.

Under precision float32 `embeddings.npy` (N, D); under int8 `codes.npy` (N, D) int8 and `scales.npy` (N,) float32; under
binary also `bits.npy` (N, ceil(D / 8)) uint8 (`b3.data.codes`). With them `ids.json`, `rows.jsonl` (what a result
shows) and, written last, `manifest.json`: the checkpoints, the rows, the options and, for codes, their recall against
float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path

import numpy as np

from b3.data.codes import Codes, Floats, recall, signs
from b3.data.items import ImageSource, Item
from b3.data.lines import Lines
from b3.data.own import OwnData, read_rows
from b3.data.row_files import Columns, Record
from b3.errors import InputError
from b3.files import atomic, claim, sync, write_array, write_json

KIND = "b3 embeddings"
ARRAYS = {
    "float32": ("embeddings.npy",),
    "int8": ("codes.npy", "scales.npy"),
    "binary": ("codes.npy", "scales.npy", "bits.npy"),
}
TEXTS = ("ids.json", "rows.jsonl", "manifest.json")
FILES = {*TEXTS, *(name for names in ARRAYS.values() for name in names)}


@dataclass(frozen=True)
class Index:
    """A folder. rows: what each row shows, read when it is asked for. bits: of precision binary, else None."""

    vectors: Floats | Codes
    bits: np.ndarray | None
    rows: Lines
    manifest: Record


def precision_of(manifest: Record) -> str:
    return str(manifest["options"].get("precision", "float32"))


def model_arguments(manifest: Record) -> Record:
    """The arguments of `Embedder.from_pretrained` for the model of an index."""
    options = manifest["options"]
    settings = {name: options[name] for name in ("min_pixels", "max_pixels", "dim") if options.get(name) is not None}
    adapter = manifest["adapter"] and manifest["adapter"]["name"]
    return {"name": manifest["model"]["name"], "adapter": adapter, "dtype": options["dtype"], **settings}


def is_done(folder: Path, identity: Record) -> bool:
    """Whether `folder` holds just these embeddings. Raises `RunError` naming what differs if it holds others."""
    paths = ("input.path", "input.path_images")  # the same rows may have moved
    remedy = "choose another --out or delete it"
    manifest = claim(folder, identity, "index", remedy, foreign=lambda name: name not in FILES, ignore=paths)
    names = (*TEXTS, *ARRAYS[precision_of(identity)])
    return manifest is not None and all((folder / name).is_file() for name in names)


def save_index(folder: Path, vectors: np.ndarray, data: OwnData, manifest: Record) -> Record:
    """Write an index folder of (N, D) float32 vectors in the precision of its options, and return its manifest."""
    assert vectors.dtype == np.float32
    assert len(vectors) == len(data.shown)
    if (folder / "manifest.json").exists():
        (folder / "manifest.json").unlink()
        sync(folder)  # from here to the last file: no index
    precision = precision_of(manifest)
    if precision == "float32":
        write_array(folder / "embeddings.npy", vectors)
    else:
        codes, bits = Codes.of(vectors), signs(vectors) if precision == "binary" else None
        write_array(folder / "codes.npy", codes.values)
        write_array(folder / "scales.npy", codes.scales)
        if bits is not None:
            write_array(folder / "bits.npy", bits)
        manifest = {**manifest, "recall": recall(vectors, codes, bits)}
    with atomic(folder / "ids.json") as ids, atomic(folder / "rows.jsonl") as rows:
        for number, row in enumerate(data.shown):
            ids.write(f"{', ' if number else '['}{json.dumps(row['id'], ensure_ascii=False)}".encode())
            rows.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
        ids.write(b"]\n")
    write_json(folder / "manifest.json", manifest, ensure_ascii=False)
    return manifest


def load_index(folder: Path) -> Index:
    """Raises `InputError` if a file is missing or unfit. Vectors are mapped, not read; bits are in memory."""
    manifest = claim(folder, {"kind": KIND}, "index", "choose another --index", foreign=lambda name: False)
    if manifest is None:
        raise InputError(f"{folder} holds no finished embeddings (no manifest.json); run scripts/embed.py")
    names = ARRAYS[precision_of(manifest)]
    try:
        first, *others = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names)
        rows = Lines(folder / "rows.jsonl")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder} is not complete ({error}); run scripts/embed.py again") from None
    if first.ndim != 2 or any(len(array) != len(rows) for array in (first, *others)):
        raise InputError(f"{folder}: {first.shape} vectors but {len(rows)} rows; delete it and embed again")
    vectors = Codes(first, np.asarray(others[0])) if others else Floats(first)
    return Index(vectors, np.asarray(others[1]) if len(others) == 2 else None, rows, manifest)


class IndexedImages:
    """Images of the indexed rows: from their files, or out of the input file, which is read when first needed."""

    def __init__(self, rows: Sequence[Record], manifest: Record) -> None:
        self._rows, self._manifest = rows, manifest
        self._items: Sequence[Item] | None = None

    def source(self, row: int) -> ImageSource | None:
        """What `Still` takes, or None: the row has no image, or the input file has moved or changed since."""
        if self._rows[row]["image"]:
            path: str = self._rows[row]["image"]
            return path
        items = self._input()
        return items[row].image if row < len(items) else None

    def _input(self) -> Sequence[Item]:
        if self._items is None:
            names, source = self._manifest["options"], self._manifest["input"]
            columns = Columns(names["text"], names["image"], names["id"])
            try:
                data = read_rows(source["path"], columns, source["path_images"])
                is_same = len(data) == len(self._rows) and all(map(eq, data.shown, self._rows))
                self._items = data.items if is_same else []
            except InputError:
                self._items = []
        return self._items
