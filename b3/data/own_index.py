"""The folder that holds the embeddings of a user's rows.

`embeddings.npy` (N, D) float32, `ids.json`, `rows.jsonl` (what a result shows) and, written last, `manifest.json`: what
decided the vectors, that is the checkpoints, the rows and the options.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from b3.data.own import Columns, OwnData
from b3.errors import InputError
from b3.files import claim, sha256, write_array, write_json, write_text

KIND = "b3 embeddings"
FILES = ("embeddings.npy", "ids.json", "rows.jsonl", "manifest.json")


def describe_checkpoint(name: str | None, key_of: Callable[[str], str]) -> dict[str, str] | None:
    """{"name", "key"} of a checkpoint for the manifest; a folder's name becomes absolute. None for None."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    return {"name": str(folder.resolve()) if folder.is_dir() else name, "key": key_of(name)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder. Raises `InputError` if there is none or it is not one of embeddings."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} holds no finished embeddings (no manifest.json); run scripts/embed.py") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{file} is not one of scripts/embed.py; choose another folder")
    return manifest


def is_done(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether `folder` holds just these embeddings. Raises `RunError` naming what differs if it holds others."""
    paths = ("input.path", "input.path_images")  # the same rows may have moved
    remedy = "choose another --out or delete it"
    known = claim(folder, identity, "index", remedy, foreign=lambda name: name not in FILES, ignore=paths)
    return known is not None and all((folder / name).is_file() for name in FILES)


def identity_of(
    data: OwnData, file: Path, columns: Columns, image_dir: Path | None, checkpoints: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """What decides the vectors, in the form that the manifest keeps."""
    where = {"path": str(file.resolve()), "path_images": str((image_dir or file.parent).resolve())}
    content = {"sha256": sha256(file), "images_sha256": data.images_sha256}
    return {"kind": KIND, **checkpoints, "input": where | content, "options": options | asdict(columns)}


def save_index(folder: Path, vectors: np.ndarray, data: OwnData, manifest: dict[str, Any]) -> None:
    """Write an index folder, its manifest last."""
    assert vectors.dtype == np.float32
    assert len(vectors) == len(data.ids)
    (folder / "manifest.json").unlink(missing_ok=True)
    write_array(folder / "embeddings.npy", vectors)
    write_json(folder / "ids.json", data.ids, indent=None, ensure_ascii=False)
    write_text(folder / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data.shown))
    write_json(folder / "manifest.json", manifest, ensure_ascii=False)


def load_index(folder: Path) -> tuple[np.ndarray, list[dict[str, Any]], dict[str, Any]]:
    """(vectors (N, D), what each row shows, manifest). Raises `InputError` if a file is missing or does not fit."""
    manifest = read_manifest(folder)
    try:
        vectors = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder} is not complete ({error}); run scripts/embed.py again") from None
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise InputError(f"{folder}: {vectors.shape} vectors but {len(rows)} rows; delete it and embed again")
    return vectors, rows, manifest
