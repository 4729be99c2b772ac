"""Are mined batches too hard for this student? Asked once, after the first hundred steps.

And with `batch.random_steps: auto` every 50 steps: is the student ready for the first of them?

The student picks each query's target among those of 64 rows of its batch, whatever |B| is, for the shares at which
mining helps or harms were found at that size: in the next mined batches, and in as many batches of random rows from the
same data sets, which is what the control would see. Mining has helped students that had 0.47 to 0.66 in random batches
by then, and 0.33 to 0.51 in mined ones; it has harmed those that had 0.12 to 0.33 in random ones (docs/recipes.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from b3 import distributed
from b3.config import Config
from b3.data.datasets import PairDataset
from b3.data.items import item_id
from b3.model.encode import Encoder
from b3.train.sampler import BatchPlanSampler, build_sampler

EVERY = 50  # steps between the questions of batch.random_steps auto
STEPS = 100  # after which it is asked; later where the recipe begins with random batches for longer
QUERIES = 512  # asked in each kind of batch, at least
READY = 0.4  # precision in random batches below which a student cannot use harder ones yet
ROWS = 64  # of a batch, among whose targets a student picks
LEAST = 0.5  # of it, in mined batches: below, they are too hard


@dataclass(frozen=True)
class Hardness:
    """Precision@1 of the student among `ROWS` rows of its batches: of mined ones, and of random ones."""

    mined: float
    random: float

    @property
    def is_too_hard(self) -> bool:
        return self.random < READY or self.mined < LEAST * self.random

    def advice(self, step: int) -> str:
        """One line: what was found, and what to do about it."""
        return (
            f"batches may be too hard for this student: after {step} steps it finds {100 * self.mined:.0f} % of the"
            f" targets in mined batches and {100 * self.random:.0f} % in random ones, among {ROWS} (mining has helped"
            f" from {100 * READY:.0f} % in random ones on, and half of that share in mined ones). Start from a trained"
            f" model, begin with random batches (batch.random_steps=auto), or raise mining.p; docs/recipes.md"
        )


def asked_at(config: Config, random_steps: int | None) -> int | None:
    """The step after which a run asks: None for one without mined batches, or none of them after it.

    random_steps: as the sampler has them; None: not known yet.
    """
    if random_steps is None:
        return None
    step = max(STEPS, random_steps)
    return step if config.batch.mined and step < config.train.steps else None


def measure(
    config: Config, datasets: list[PairDataset], sampler: BatchPlanSampler, step: int, encoder: Encoder
) -> Hardness:
    """Compare the next batches with random ones: a collective call, which leaves training as it was."""
    policy = "random_mixed" if config.batch.policy == "b3_mixed" else "random"
    batch = config.batch.model_copy(update={"policy": policy, "random_steps": sampler.random_steps})
    control = build_sampler(config.model_copy(update={"batch": batch}), datasets, [])
    return Hardness(*(precision(datasets, each, step, encoder) for each in (sampler, control)))


def precision(datasets: list[PairDataset], sampler: BatchPlanSampler, step: int, encoder: Encoder) -> float:
    """How often the student finds its target in batches from `step` on: a collective call."""
    found = sum(share * _precision(batch, datasets, encoder) for batch, share in next_batches(sampler, step))
    first: float = distributed.gather_objects(found)[0]  # ranks on unlike machines must not decide differently
    return first


def next_batches(sampler: BatchPlanSampler, step: int) -> list[tuple[np.ndarray, float]]:
    """Some batches of each pool from `step` on, `QUERIES` rows in all or more, and what share each stands for.

    As many of each pool, for some data sets are far easier than others; a pool's share is that of its batches.
    """
    pools = sampler.pools_at(step)
    each = math.ceil(QUERIES / sampler.batch_size / len(pools))
    pool_of = {part.number: pool for pool in pools for part in pool.parts}
    total, missing, found = sum(pool.num_batches for pool in pools), {pool.number: each for pool in pools}, []
    while any(missing.values()):
        batch = sampler.batch(step)
        pool = pool_of[int(batch[0, 0])]
        if missing[pool.number]:
            missing[pool.number] -= 1
            found.append((batch, pool.num_batches / total / each))
        step += 1
    return found


def _precision(batch: np.ndarray, datasets: list[PairDataset], encoder: Encoder) -> float:
    """Share of the rows (B, 2) whose own target scores highest in their part of the batch, `ROWS` that follow one
    another; equal targets and queries are no rivals.

    A row that cannot be read counts as missed.
    """
    rows = [(datasets[number], row) for number, row in batch.tolist()]
    queries, targets = [d.query(row) for d, row in rows], [d.target(row) for d, row in rows]
    vectors = np.nan_to_num(encoder.encode([*queries, *targets]))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = vectors[: len(rows)] @ vectors[len(rows) :].T
    own = scores.diagonal().copy()
    part = np.arange(len(rows)) // ROWS
    scores[part[:, None] != part[None, :]] = -np.inf
    for items in (queries, targets):
        ids = np.array([item_id(item) for item in items])
        scores[ids[:, None] == ids[None, :]] = -np.inf
    return float((own > scores.max(axis=1)).mean())
