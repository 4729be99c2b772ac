"""A test bed on disk: what is trained on, what is held out, frozen vectors of students, and teachers.

    FOLDER/train/SET.jsonl           training pairs (the schema of MMEB-train)
    FOLDER/test.json                 questions about held-out items, and the pools that they are ranked over
    FOLDER/vectors-NAME/             of every item, for heads (`b3.model.backbones.heads`)
    FOLDER/teachers/NAME/            SET_queries.npy and SET_targets.npy, unit vectors

Images are named below FOLDER/images, which stays empty: heads read their vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from b3.data.items import Item

Content = tuple[str, str]  # (text, path of an image), '' for none
DONE = "test.json"


@dataclass(frozen=True)
class Pair:
    """A training row. names: of what it is about; rows that share one may answer each other's queries."""

    query: Content
    target: Content
    names: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A held-out query and its answer, ranked over a pool of `Bed.pools`. right: others there that answer it too."""

    query: Content
    answer: Content
    pool: str
    right: frozenset[Content] = frozenset()


@dataclass(frozen=True)
class Bed:
    """train, test and validation by data set, pools by name; no held-out item's name is in training."""

    train: dict[str, list[Pair]]
    test: dict[str, list[Question]]
    pools: dict[str, list[Content]]
    validation: dict[str, list[Question]] = field(default_factory=dict)

    def contents(self) -> list[Content]:
        """Everything that needs a vector, in a fixed order."""
        held = [q for part in (self.test, self.validation) for listed in part.values() for q in listed]
        found = {content for pair in _all(self.train) for content in (pair.query, pair.target)}
        found.update(content for q in held for content in (q.query, q.answer))
        return sorted(found.union(*self.pools.values()))


def _all(by_name: Mapping[str, Iterable[Any]]) -> list[Any]:
    return [one for listed in by_name.values() for one in listed]


def as_item(content: Content, folder: Path) -> Item:
    """The item that training reads for it."""
    from b3.data.images import FolderImages, ImageRef
    from b3.data.items import Item

    text, path = content
    return Item(text, ImageRef(FolderImages(folder / "images"), path)) if path else Item(text)


def write_bed(folder: Path, bed: Bed, students: Mapping[str, np.ndarray], teachers: Mapping[str, np.ndarray]) -> None:
    """Write a bed; students and teachers are vectors of `Bed.contents`, (n, D) each, scaled to length 1 here."""
    from b3.model.backbones.heads import write_vectors

    for name in ("train", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, pairs in bed.train.items():
        lines = (
            dict(zip(("qry", "qry_image_path", "pos_text", "pos_image_path"), (*p.query, *p.target), strict=True))
            for p in pairs
        )
        (folder / "train" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    contents = bed.contents()
    where = {content: i for i, content in enumerate(contents)}
    items = [as_item(content, folder) for content in contents]
    for name, vectors in students.items():
        write_vectors(folder / f"vectors-{name}", items, unit(vectors))
    for name, vectors in teachers.items():
        (folder / "teachers" / name).mkdir(parents=True, exist_ok=True)
        for part, pairs in bed.train.items():
            for side in ("query", "target"):
                plural = {"query": "queries", "target": "targets"}[side]
                rows = [where[getattr(pair, side)] for pair in pairs]
                np.save(folder / "teachers" / name / f"{part}_{plural}.npy", unit(vectors[rows]).astype(np.float32))
    places = {name: {content: i for i, content in enumerate(pool)} for name, pool in bed.pools.items()}
    tree = {
        "names": {name: [pair.names for pair in pairs] for name, pairs in bed.train.items()},
        "pools": bed.pools,
        "test": {name: [_record(q, places) for q in asked] for name, asked in bed.test.items()},
        "validation": {name: [_record(q, places) for q in asked] for name, asked in bed.validation.items()},
    }
    (folder / DONE).write_text(json.dumps(tree) + "\n")


def _record(question: Question, places: Mapping[str, Mapping[Content, int]]) -> list[Any]:
    """[query, pool, place of the answer, places of what is right too]."""
    place = places[question.pool]
    right = sorted(place[content] for content in question.right if content in place and content != question.answer)
    return [question.query, question.pool, place[question.answer], right]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays."""
    scaled: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled
