"""What a trained student is worth, and what its batches were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from b3.data.items import item_id
from benchmarks.evidence.beds import DONE, as_item
from benchmarks.evidence.results import VALIDATION

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


def bed_ranks(model: str, folder: Path) -> dict[str, np.ndarray]:
    """Ranks of the right answers of a bed by data set (see `ranks_of_answers`), over the common pools.

    Those of the validation rows, on which settings are chosen, are named "validation/SET".
    """
    from b3.model.embedder import Embedder

    tests = json.loads((folder / DONE).read_text())
    embedder = Embedder.from_pretrained(model, dtype="float32")

    def vectors(contents: list[list[str]]) -> np.ndarray:
        return embedder.encode([as_item((text, path), folder) for text, path in contents])

    pools = {name: vectors(pool) for name, pool in tests["pools"].items()}
    found = {}
    for prefix, part in (("", "test"), (f"{VALIDATION}/", VALIDATION)):
        for name, asked in tests[part].items():
            queries, pool, answers, right = zip(*asked, strict=True)
            assert len(set(pool)) == 1, "a data set has one pool"
            ranks = ranks_of_answers(vectors(list(queries)), pools[pool[0]], np.asarray(answers), list(right))
            found[prefix + name] = ranks
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
        data = load_eval(
            config.eval.source,
            name,
            config.eval.split,
            image_dir=config.eval.image_dir,
            prefix_targets=config.eval.prefix_targets,
        )
        found[name] = np.asarray(evaluate_subset(data, encoder).predicted != 0, dtype=np.int64)
    return found


def batch_facts(config: Config, folder: Path) -> dict[str, float]:
    """Means per query over some batches of the run, by the full teacher's ranks of distinct targets within the query's
    data set.

    window: other targets of the batch at ranks [30, 130). above: at ranks [0, 30). synonyms: other rows that share a
    name with the query's (equal targets and queries, which the loss masks, among them).
    """
    from b3.data.datasets import load_datasets
    from b3.train.build import load_plans
    from b3.train.sampler import build_sampler

    datasets = load_datasets(config)
    names = json.loads((folder / DONE).read_text())["names"]
    distinct = [np.unique([item_id(d.target(i)) for i in range(len(d))], return_inverse=True)[1] for d in datasets]
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
            own = distinct[number]
            firsts = np.unique(own, return_index=True)[1]
            near, above = _count(queries[members], targets[firsts], own[members])
            listed = [set(names[datasets[number].name][i]) for i in members]
            shared = sum(not a.isdisjoint(b) for i, a in enumerate(listed) for b in listed[:i] + listed[i + 1 :])
            sums += (near, above, shared)
        count += len(sets)
    window, above, shared = (sums / count).tolist()
    return {"window": window, "above": above, "synonyms": shared}


def _count(queries: np.ndarray, targets: np.ndarray, own: np.ndarray) -> tuple[int, int]:
    """Over the members of one data set in a batch: others in the window, above it; equal targets are none.

    Args:
        queries: (n, D) of the members. targets: (U, D), distinct. own: (n,) the members' among them.
    """
    scores = queries @ targets.T
    place = np.empty_like(scores, dtype=np.int64)
    np.put_along_axis(place, np.argsort(-scores, axis=1, kind="stable"), np.arange(len(targets))[None], axis=1)
    inside = place[:, own]
    others = own[:, None] != own[None, :]
    return int(((inside >= 30) & (inside < 130) & others).sum()), int(((inside < 30) & others).sum())
