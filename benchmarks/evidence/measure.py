"""What a trained student is worth, and what its batches were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from b3.config import Config

BATCHES = 12  # looked at to say what batches are made of


def ranks_of_answers(
    queries: np.ndarray, pool: np.ndarray, answers: np.ndarray, also_right: list[list[int]]
) -> np.ndarray:
    """(n,) int64: how many wrong candidates score above each query's answer; ties count as above.

    Args:
        queries: (n, D), pool: (c, D), unit vectors. answers: (n,) int64 places in the pool.
        also_right: for each query the other candidates that answer it; they are left out.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), 500):
        block = slice(start, start + 500)
        scores = queries[block] @ pool.T
        rows = np.arange(len(scores))
        own = scores[rows, answers[block]].copy()
        for row, others in enumerate(also_right[block]):
            scores[row, others] = -np.inf
        scores[rows, answers[block]] = -np.inf
        ranks[block] = (scores >= own[:, None]).sum(axis=1)
    return ranks


def wordnet_ranks(model: str, folder: Path) -> dict[str, np.ndarray]:
    """Ranks of the right definition by data set (see `ranks_of_answers`), over the common pool."""
    from b3.model.embedder import Embedder

    parts = json.loads((folder / "split.json").read_text())
    embedder = Embedder.from_pretrained(model, dtype="float32")
    texts = [row["target"] for row in parts["pool"]]
    where = {text: i for i, text in enumerate(texts)}
    pool = embedder.encode(texts)
    by_lemma: dict[str, list[int]] = {}
    for i, row in enumerate(parts["pool"]):
        for lemma in row["lemmas"]:
            by_lemma.setdefault(lemma, []).append(i)
    found = {}
    for name, rows in parts["queries"].items():
        queries = embedder.encode([row["query"] for row in rows])
        right = [[] if name == "example" else by_lemma.get(row["query"].lower(), []) for row in rows]
        found[name] = ranks_of_answers(queries, pool, np.asarray([where[row["target"]] for row in rows]), right)
    return found


def emoji_ranks(config: Config) -> dict[str, np.ndarray]:
    """0 where the right candidate comes first, else 1, by subset of the recipe's evaluation."""
    from b3.data.datasets import load_eval
    from b3.eval.run import evaluate_subset
    from b3.model.embedder import Embedder
    from b3.model.encode import Encoder

    assert config.eval is not None
    model = Embedder.from_pretrained(config.output_dir, dtype="float32")
    encoder, found = Encoder(model), {}
    for name in config.eval.subsets:
        data = load_eval(config.eval.source, name, config.eval.split, prefix_targets=config.eval.prefix_targets)
        found[name] = np.asarray(evaluate_subset(data, encoder).predicted != 0, dtype=np.int64)
    return found


def batch_facts(config: Config, folder: Path) -> dict[str, float]:
    """Means per query over some batches of the run, by the full teacher's ranks within the query's data set.

    window: other targets of the batch at ranks [30, 130). above: at ranks [0, 30). synonyms: other rows whose synset
    shares a lemma with the query's (equal queries, which the loss masks, among them).
    """
    from b3.data.datasets import load_datasets
    from b3.train.build import load_plans
    from b3.train.sampler import build_sampler

    datasets = load_datasets(config)
    rows_of = json.loads((folder / "split.json").read_text())["train"]
    vectors = [
        tuple(np.load(folder / "teachers" / "full" / f"{d.name}_{side}.npy") for side in ("queries", "targets"))
        for d in datasets
    ]
    sampler = build_sampler(config, datasets, load_plans(config, datasets))
    sums, count = np.zeros(3), 0
    for index in np.linspace(0, config.train.steps - 1, min(BATCHES, config.train.steps)).astype(int).tolist():
        sets, members_of = sampler.batch(index).T
        for number in np.unique(sets):
            members = members_of[sets == number]
            queries, targets = vectors[number]
            rows = [rows_of[datasets[number].name][i] for i in members]
            sums += _count(queries[members], targets, members, rows)
        count += len(sets)
    window, above, shared = (sums / count).tolist()
    return {"window": window, "above": above, "synonyms": shared}


def _count(queries: np.ndarray, targets: np.ndarray, members: np.ndarray, rows: list[dict[str, Any]]) -> np.ndarray:
    """(3,) sums over the members of one data set in a batch: others in the window, above it, synonyms."""
    scores = queries @ targets.T
    place = np.empty_like(scores, dtype=np.int64)
    np.put_along_axis(place, np.argsort(-scores, axis=1, kind="stable"), np.arange(len(targets))[None], axis=1)
    inside = place[:, members]
    others = members[:, None] != members[None, :]
    lemmas = [set(row["lemmas"]) for row in rows]
    shared = sum(not own.isdisjoint(other) for i, own in enumerate(lemmas) for other in lemmas[:i] + lemmas[i + 1 :])
    window = ((inside >= 30) & (inside < 130) & others).sum()
    return np.asarray([window, ((inside < 30) & others).sum(), shared], dtype=np.float64)
