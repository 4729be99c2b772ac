"""Several plans mixed over training: exact shares, each plan's own epochs, and any step without replaying."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b3.train import BatchPlanSampler
from b3.train.mix import Schedule

BASE = np.arange(40).reshape(10, 4)
HARD = np.arange(40).reshape(2, 20).T
SCHEDULE = [(20, {"base": 1.0}), (60, {"base": 0.25, "hard": 0.75})]


def sampler(**options: int) -> BatchPlanSampler:
    return BatchPlanSampler({"base": [BASE], "hard": [HARD]}, 8, steps=60, schedule=SCHEDULE, **options)


def made_of(batch: np.ndarray, communities: np.ndarray) -> bool:
    known = {frozenset(c.tolist()) for c in communities}
    return all(frozenset(part.tolist()) in known for part in batch.reshape(-1, communities.shape[1]))


def test_each_phase_draws_from_its_plans_in_their_shares() -> None:
    mixed = sampler()
    batches = [mixed.batch(step) for step in range(60)]
    of_base = [made_of(batch, BASE) for batch in batches]
    assert [made_of(batch, HARD) for batch in batches[20:]] == [not b for b in of_base[20:]]
    assert all(of_base[:20])
    assert sum(of_base[20:]) == 10
    for ten in range(20, 60, 10):
        assert 1 <= sum(of_base[ten : ten + 10]) <= 4, "evenly spread"


def test_each_plan_goes_through_its_own_epochs() -> None:
    mixed = sampler(seed=3)
    for name, communities in (("base", BASE), ("hard", HARD)):
        drawn = [mixed.batch(step) for step in range(60) if made_of(mixed.batch(step), communities)]
        alone = BatchPlanSampler(communities, 8, seed=3)
        assert [b.tolist() for b in drawn] == [alone.batch(i).tolist() for i in range(len(drawn))], name


@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_is_indexing_on_every_rank(ranks: int) -> None:
    for rank in range(ranks):
        whole = list(sampler(rank=rank, world_size=ranks))
        assert len(whole) == len(sampler(rank=rank, world_size=ranks)) == 60
        for start in (0, 1, 19, 20, 33, 60):
            part = sampler(start=start, rank=rank, world_size=ranks)
            assert len(part) == 60 - start
            assert list(part) == whole[start:]


def test_seeds_give_other_orders() -> None:
    orders = [[sampler(seed=seed).schedule.at(s)[0] for s in range(60)] for seed in (0, 1, 0)]  # type: ignore[union-attr]
    assert orders[0] == orders[2] != orders[1]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_counts_are_exact_and_indices_count_up(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(4, 60), min_size=1, max_size=4))
    untils = np.cumsum(lengths).tolist()
    phases = []
    for until in untils:
        names = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
        parts = [data.draw(st.integers(1, 5)) for _ in names]
        phases.append((until, {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}))
    schedule = Schedule(phases, untils[-1], data.draw(st.integers(0, 99)))
    steps = [schedule.at(step) for step in range(untils[-1])]
    for name in "abc":
        assert [index for n, index in steps if n == name] == list(range(sum(n == name for n, _ in steps)))
    first = 0
    for until, shares in phases:
        counts = {name: sum(n == name for n, _ in steps[first:until]) for name in "abc"}
        for name in "abc":
            assert abs(counts[name] - shares.get(name, 0) * (until - first)) < 1
        first = until
