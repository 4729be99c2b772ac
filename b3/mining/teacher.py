"""The teacher of a recipe: a checkpoint, a sentence-transformers model, or arrays; its embeddings of a data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from b3 import distributed
from b3.config import Config, DatasetConfig
from b3.data.datasets import PairDataset
from b3.data.items import Item
from b3.data.lazy import Lazy
from b3.data.tables import embedded_teacher, split_source
from b3.errors import DataError, RunError
from b3.files import belongs_elsewhere, claim, sampled_sha256, wait_for, write_array, write_json
from b3.model.checkpoint import sampled_key

SENTENCE_TRANSFORMER = "st:"
CACHE = ".teacher"  # what is encoded, until a call of mining ends
VECTORS = ".vectors"  # what training reads
SIDES = ("queries", "targets")

Encode = Callable[[Sequence[Item], str], np.ndarray]  # (items, what the bar says) -> (N, D)


def teacher_name(config: Config) -> str:
    mining = config.mining
    name = mining.teacher if mining.teacher_adapter is None else f"{mining.teacher} + {mining.teacher_adapter}"
    name = name if mining.teacher_prompt is None else f"{name}, prompt {mining.teacher_prompt}"
    return name if mining.teacher_dim is None else f"{name}, the first {mining.teacher_dim} numbers"


def teacher_key(config: Config, entry: DatasetConfig) -> str | None:
    """A digest of the teacher's files for a data set, None where they are not in a folder of this machine.

    The same name may be another teacher by now: a checkpoint that was trained again, arrays that were made anew.
    """
    mining, folder = config.mining, Path(config.mining.teacher)
    if not folder.is_dir():
        return None
    if is_model(config):
        adapter = mining.teacher_adapter
        return sampled_key(folder) + (f" + {sampled_key(adapter)}" if adapter and Path(adapter).is_dir() else "")
    files = [folder / f"{entry.subset}_{side}.npy" for side in SIDES]
    return " ".join(sampled_sha256(file)[:32] for file in files) if all(map(Path.is_file, files)) else None


def is_model(config: Config) -> bool:
    """Whether the teacher encodes, rather than being given as arrays."""
    teacher, folder = config.mining.teacher, Path(config.mining.teacher)
    configs = ("config.json", "adapter_config.json")
    return teacher != "embedded" and not (folder.is_dir() and not any((folder / name).exists() for name in configs))


def load_teacher(config: Config) -> Encode | None:
    """What encodes items by the teacher model, or None when its embeddings are given as arrays.

    Finished batches of a checkpoint are kept in `mining.dir`, so that an interrupted call continues, until
    `forget_teacher`.
    """
    mining = config.mining
    if mining.teacher.startswith(SENTENCE_TRANSFORMER):
        if mining.teacher_adapter is not None:
            raise RunError(
                f"mining.teacher_adapter would not be loaded: mining.teacher {mining.teacher} encodes with its own"
                " weights; leave it out"
            )
        if mining.teacher_prompt is not None:
            raise RunError(f"mining.teacher_prompt is not read by mining.teacher {mining.teacher}; leave it out")
        from b3.mining.sentence_transformer import SentenceTransformerTeacher

        return SentenceTransformerTeacher(mining.teacher.removeprefix(SENTENCE_TRANSFORMER)).encode
    if not is_model(config):
        for key in ("teacher_adapter", "teacher_prompt"):
            if getattr(mining, key) is not None:
                raise RunError(f"mining.{key} needs mining.teacher to be a checkpoint")
        return None
    return _load_checkpoint(config)


def _load_checkpoint(config: Config) -> Encode:
    from b3.model.cache import EmbeddingCache
    from b3.model.checkpoint import adapter_key, checkpoint_key
    from b3.model.embedder import Embedder, backbone_class, locate
    from b3.model.encode import Encoder, unit

    mining = config.mining
    kind = backbone_class(locate(mining.teacher)[0])
    budget = ("min_pixels", "max_pixels")  # the student's, where the teacher reads images
    asked = {k: v for k, v in config.model.settings().items() if k in budget and k in kind.setting_names}
    if mining.teacher_prompt is not None:
        asked["prompt"] = mining.teacher_prompt
    model = Embedder.from_pretrained(mining.teacher, adapter=mining.teacher_adapter, dtype=config.model.dtype, **asked)
    facts: dict[str, Any] = {
        "model": checkpoint_key(mining.teacher),
        "adapter": None if mining.teacher_adapter is None else adapter_key(mining.teacher_adapter),
        "numerics": model.numerics,
        **asdict(model.settings),
    }
    cache = EmbeddingCache(Path(mining.dir) / CACHE, facts)
    encoder = Encoder(model, mining.batch_tokens, workers=config.train.workers, cache=cache)
    return lambda items, label: unit(encoder.encode(items, label), in_place=True)


def is_teacher_kept(config: Config) -> bool:
    """Whether there is anything for `forget_teacher`."""
    return (Path(config.mining.dir) / CACHE).exists()


def forget_teacher(config: Config) -> None:
    """Delete what `load_teacher` kept: the plans are saved."""
    if distributed.rank() == 0:
        shutil.rmtree(Path(config.mining.dir) / CACHE, ignore_errors=True)


def teacher_embeddings(
    config: Config, entry: DatasetConfig, dataset: PairDataset, teacher: Encode | None
) -> tuple[np.ndarray, np.ndarray]:
    """(queries, targets), each (N, D), of the recipe's teacher for one data set; D is `mining.teacher_dim` if set.

    Without `teacher` those given as arrays, or those that `store_vectors` kept of a model.

    Raises `DataError` for arrays that are missing, do not fit the data set or are shorter than that; `RunError` if
    nothing was kept.
    """
    queries, targets = _whole_embeddings(config, entry, dataset, teacher)
    dim = config.mining.teacher_dim
    if dim is None:
        return queries, targets
    if dim > queries.shape[1]:
        raise DataError(f"mining.teacher_dim {dim} exceeds the teacher's {queries.shape[1]} numbers; lower it")
    return queries[:, :dim], targets[:, :dim]


def _whole_embeddings(
    config: Config, entry: DatasetConfig, dataset: PairDataset, teacher: Encode | None
) -> tuple[np.ndarray, np.ndarray]:
    if teacher is not None:
        return _encode(dataset, teacher)
    if is_model(config):
        return _stored_vectors(config, entry, dataset)
    if config.mining.teacher == "embedded":
        kind, name = split_source(entry.source or config.data.source)
        if kind != "embedded":
            raise DataError(
                f"mining.teacher 'embedded' needs embedded data, but {entry.subset} comes from {kind}:{name}"
            )
        queries, targets = embedded_teacher(name, entry.subset)
    else:
        folder = Path(config.mining.teacher)
        queries, targets = (load_matrix(folder / f"{entry.subset}_{side}.npy") for side in SIDES)
    if entry.max_rows is not None:
        queries, targets = queries[: entry.max_rows], targets[: entry.max_rows]
    for side, array in (("queries", queries), ("targets", targets)):
        if len(array) != len(dataset):
            raise DataError(f"teacher {side} of {entry.subset} have {len(array)} rows, the data set {len(dataset)}")
    return queries, targets


def keeps_vectors(config: Config) -> bool:
    """Whether mining keeps what the teacher encodes, as training reads it."""
    return bool(config.train.teacher_keys) and is_model(config)


def _stored(config: Config, entry: DatasetConfig, dataset: PairDataset) -> tuple[Path, dict[str, Any], bool]:
    """(folder of a data set's kept vectors, what its manifest says, whether they are there).

    Raises `RunError` if it holds those of another teacher or other rows.
    """
    whole = config.mining.model_copy(update={"teacher_dim": None})
    facts = {
        "teacher": teacher_name(config.model_copy(update={"mining": whole})),
        "data_fingerprint": dataset.fingerprint(),
    }
    key = teacher_key(config, entry)
    folder, remedy = _stored_at(config, entry), "mine into another mining.dir, or delete it"
    record = claim(folder, facts, "teacher's vectors", remedy, foreign=lambda name: False)
    before = (record or {}).get("teacher_key")
    if None not in (key, before) and key != before:
        raise belongs_elsewhere(folder, "teacher's vectors", [f"teacher_key was {before!r}, now {key!r}"], remedy)
    return folder, {**facts, "teacher_key": key}, record is not None


def missing_vectors(
    config: Config, jobs: list[tuple[DatasetConfig, PairDataset]]
) -> list[tuple[DatasetConfig, PairDataset]]:
    """Those whose vectors are not below `mining.dir` yet. A collective call."""
    is_there = distributed.gather_objects([_stored(config, *job)[2] for job in jobs])[0]
    return [job for job, there in zip(jobs, is_there, strict=True) if not there]


def store_vectors(config: Config, missing: list[tuple[DatasetConfig, PairDataset]]) -> None:
    """Encode data sets, and keep their vectors below `mining.dir`. A collective call."""
    teacher = load_teacher(config)
    assert teacher is not None, "keeps_vectors"
    for entry, dataset in missing:
        arrays = _encode(dataset, teacher)
        if distributed.rank() == 0:
            folder, facts, _ = _stored(config, entry, dataset)
            for side, array in zip(SIDES, arrays, strict=True):
                write_array(folder / f"{side}.npy", array)
            write_json(folder / "manifest.json", facts)
    distributed.barrier()
    for entry, _ in missing:
        wait_for(_stored_at(config, entry) / "manifest.json")


def _stored_at(config: Config, entry: DatasetConfig) -> Path:
    return Path(config.mining.dir) / VECTORS / entry.subset


def _stored_vectors(config: Config, entry: DatasetConfig, dataset: PairDataset) -> tuple[np.ndarray, np.ndarray]:
    folder, _, is_there = _stored(config, entry, dataset)
    if not is_there:
        keys = " and ".join(config.train.teacher_keys) or f"train.loss {config.train.loss}"
        raise RunError(
            f"{keys} reads vectors of mining.teacher {config.mining.teacher} in each step, and {folder} holds none;"
            " run: python scripts/mine.py CONFIG.yaml"
        )
    queries, targets = (load_matrix(folder / f"{side}.npy") for side in SIDES)
    return queries, targets


def _encode(dataset: PairDataset, teacher: Encode) -> tuple[np.ndarray, np.ndarray]:
    """Raises `DataError` naming the row of an item that the teacher cannot read."""
    from b3.model.encode import ItemError

    sides = {"queries": dataset.query, "targets": dataset.target}
    try:
        arrays = [
            teacher(Lazy(item_of, range(len(dataset))), f"{dataset.name} {side}") for side, item_of in sides.items()
        ]
    except ItemError as error:
        rows = (i for i in range(len(dataset)) for item_of in sides.values() if item_of(i).key == error.item.key)
        raise DataError(f"{dataset.name} {dataset.where(next(rows))}: teacher: {error}") from None
    return arrays[0], arrays[1]


def load_matrix(file: Path) -> np.ndarray:
    """A (N, D) array of floats, memory-mapped. Raises `DataError` naming the file and what is wrong with it."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist; write the teacher's embeddings there as a (N, D) .npy file") from None
    except Exception:  # a damaged header is read as Python and may raise anything
        raise DataError(
            f"{file} is not an .npy file of numbers; write the teacher's embeddings with numpy.save"
        ) from None
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(f"{file} has shape {array.shape} and type {array.dtype}; expected floats of shape (N, D)")
    return array
