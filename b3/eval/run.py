"""Evaluate a model on subsets: encode each distinct item once, score, write, and skip what is already there."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.data.records import EvalDataset, Item
from b3.data.sources import load_eval
from b3.errors import RunError
from b3.eval.report import read_score, summarise, write_subset, write_summary
from b3.eval.score import SubsetScore, score_subset
from b3.files import write_atomic

if TYPE_CHECKING:
    from b3.model.embedder import Embedder

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """Everything that decides the numbers of an evaluation."""

    model: str
    source: str
    adapter: str | None = None
    split: str = "test"
    image_dir: str | None = None
    prefix_targets: bool = False
    normalize: bool = True
    dtype: str = "float32"
    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_length: int | None = None


class VectorStore:
    """Vectors of distinct items over all subsets of a run; labels and images that repeat are encoded once."""

    def __init__(self, embedder: Embedder, normalize: bool, max_items: int | None = None) -> None:
        self.embedder, self.normalize, self.max_items = embedder, normalize, max_items
        self._index: dict[tuple[str, str], int] = {}
        self.vectors = np.empty((0, embedder.dim), dtype=np.float32)

    def add(self, items: list[Item], progress: str | None = None) -> np.ndarray:
        """(N,) int64 positions in `vectors` of `items`, encoding those not seen before."""
        fresh: dict[tuple[str, str], Item] = {}
        for item in items:
            if item.key not in self._index:
                fresh.setdefault(item.key, item)
        if fresh:
            vectors = self.embedder.encode(
                list(fresh.values()), normalize=self.normalize, max_items=self.max_items, progress=progress
            )
            if self.normalize:  # scoring normalises in float32, whatever the model's dtype
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            self._index |= {key: len(self.vectors) + i for i, key in enumerate(fresh)}
            self.vectors = np.concatenate([self.vectors, vectors])
        return np.asarray([self._index[item.key] for item in items], dtype=np.int64)


def evaluate_subset(dataset: EvalDataset, store: VectorStore, progress: bool = False) -> SubsetScore:
    """Encode and score one subset."""
    label = dataset.name if progress else None
    candidates = [dataset.candidates(row) for row in range(len(dataset))]
    queries = [dataset.query(row) for row in range(len(dataset))]
    index = store.add(queries + [item for row in candidates for item in row], label)
    ends = np.cumsum([len(dataset), *map(len, candidates)])
    parts = [index[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return score_subset(dataset, store.vectors, index[: len(dataset)], parts)


def weights_fingerprint(folder: str | Path | None) -> str | None:
    """SHA-256 over the weight and configuration files of a checkpoint folder."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    names = ("*.safetensors", "config.json", "adapter_config.json", "tokenizer.json", "adapter_model.bin")
    for file in sorted({f for pattern in names for f in Path(folder).glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _claim(folder: Path, facts: dict[str, Any], names: dict[str, Any]) -> None:
    """Write the manifest, or check that the folder holds the same evaluation. Raises `RunError` naming a difference.

    `facts` decide (weights by content), `names` are only recorded.
    """
    file = folder / MANIFEST
    if file.exists():
        known = json.loads(file.read_text())
        for key, value in facts.items():
            if known.get(key) != value:
                raise RunError(
                    f"output directory {folder} holds another evaluation ({key} was {known.get(key)!r}, now {value!r});"
                    " choose another --encode_output_path or delete it"
                )
        return
    if folder.is_dir() and any(folder.glob("*_score.json")):
        raise RunError(f"output directory {folder} holds scores of another program; choose another or delete it")
    try:
        write_atomic(file, json.dumps({**facts, "names": names}, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"output directory {folder} cannot be written ({error.strerror})") from None


def evaluate(
    spec: EvalSpec, subsets: list[str], folder: Path, *, max_items: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Evaluate `spec` on `subsets` and write all files to `folder`; subsets scored before are not scored again.

    Returns the summary (see `b3.eval.report.summarise`) with `seconds`. Raises `InputError` (before the model is
    loaded) for an unknown subset, a missing image folder, or a folder that holds another evaluation.
    """
    from b3.model.backbones import fetch

    started = time.perf_counter()
    datasets = [
        load_eval(spec.source, name, spec.split, image_dir=spec.image_dir, prefix_targets=spec.prefix_targets)
        for name in subsets
    ]
    model_folder = fetch(spec.model)
    adapter_folder = None if spec.adapter is None else fetch(spec.adapter)
    facts = asdict(spec) | {
        "model": weights_fingerprint(model_folder),
        "adapter": weights_fingerprint(adapter_folder),
    }
    _claim(folder, facts, {"model": spec.model, "adapter": spec.adapter})
    store: VectorStore | None = None
    for dataset in datasets:
        if read_score(folder, dataset.name) is not None:
            continue
        if store is None:
            store = VectorStore(load_embedder(spec), spec.normalize, max_items)
        write_subset(folder, dataset, evaluate_subset(dataset, store, progress))
    scores = {name: read_score(folder, name) for name in subsets}
    summary = summarise({name: score["acc"] for name, score in scores.items() if score is not None})
    summary["seconds"] = round(time.perf_counter() - started, 2)
    write_summary(folder, summary)
    return summary


def load_embedder(spec: EvalSpec) -> Embedder:
    from b3.model.embedder import Embedder

    return Embedder.from_pretrained(
        spec.model,
        adapter=spec.adapter,
        dtype=spec.dtype,
        min_pixels=spec.min_pixels,
        max_pixels=spec.max_pixels,
        max_length=spec.max_length,
    )
