"""Batches are a pure function of (plan, seed, epoch), cover rows at most once, and split over ranks without loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b3.errors import InputError
from b3.train import BatchPlanSampler
from b3.train.sampler import random_rows

pytestmark = pytest.mark.core


def communities(count: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count * size).reshape(count, size)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(4, 20), min_size=1, max_size=3), st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_an_epoch_has_each_row_at_most_once_in_whole_communities(counts: list[int], group: int, seed: int) -> None:
    plans = [communities(c, 4, seed + i) for i, c in enumerate(counts)]
    sampler = BatchPlanSampler(plans, 4 * group, seed=seed)
    batches = sampler.epochs.epoch(3)
    assert len(batches) == len(sampler) == sum(c // group for c in counts)
    places = np.concatenate(batches)
    assert len(np.unique(places, axis=0)) == len(places)
    known = {(d, tuple(sorted(c))) for d, plan in enumerate(plans) for c in plan}
    for batch in batches:
        (dataset,) = set(batch[:, 0].tolist())
        assert all((dataset, tuple(sorted(part))) in known for part in batch[:, 1].reshape(-1, 4))


def test_resuming_is_indexing() -> None:
    plans = [communities(9, 4, 0), communities(7, 4, 1)]
    whole = list(BatchPlanSampler(plans, 8, seed=5, steps=40))
    for start in (0, 1, 7, 39, 40):
        part = BatchPlanSampler(plans, 8, seed=5, steps=40, start=start)
        assert len(part) == 40 - start
        assert list(part) == whole[start:]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_each_batch_in_order(ranks: int) -> None:
    plan = communities(10, 4, 0)
    whole = list(BatchPlanSampler(plan, 8, steps=12))
    parts = [list(BatchPlanSampler(plan, 8, steps=12, rank=r, world_size=ranks)) for r in range(ranks)]
    assert [[row for p in parts for row in p[i]] for i in range(12)] == whole


def test_epochs_differ_and_left_over_communities_rotate() -> None:
    plan = communities(5, 4, 0)
    sampler = BatchPlanSampler(plan, 16, seed=1)
    epochs = [np.sort(sampler.epochs.epoch(e)[..., 1].ravel()) for e in range(20)]
    assert len({tuple(e) for e in epochs}) > 1
    assert set(np.concatenate(epochs)) == set(range(20))


def test_seeds_differ_and_repeat() -> None:
    plan = random_rows(64)
    a, b, c = (list(BatchPlanSampler(plan, 8, seed=s, steps=8)) for s in (0, 0, 1))
    assert a == b != c


def test_one_plan_gives_row_numbers_and_a_list_of_plans_pairs() -> None:
    plan = communities(6, 4, 0)
    assert [[(0, row) for row in batch] for batch in BatchPlanSampler(plan, 8)] == list(BatchPlanSampler([plan], 8))


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_steps_are_the_fair_control_and_then_the_plans_begin(ranks: int) -> None:
    plans, pools = [communities(9, 4, 0), communities(7, 4, 1)], [0, 0]
    control = BatchPlanSampler([random_rows(36), random_rows(28)], 8, seed=5)
    mined = BatchPlanSampler(plans, 8, seed=5, pools=pools)

    def parts(start: int) -> list[list]:
        options = {"seed": 5, "pools": pools, "random_steps": 10, "steps": 30, "start": start, "world_size": ranks}
        slices = [list(BatchPlanSampler(plans, 8, rank=rank, **options)) for rank in range(ranks)]  # type: ignore[arg-type]
        return [[place for part in batch for place in part] for batch in zip(*slices, strict=True)]

    whole = parts(0)
    expected = [control.batch(step) for step in range(10)] + [mined.batch(step) for step in range(20)]
    assert whole == [[tuple(place) for place in batch] for batch in (b.tolist() for b in expected)]
    for start in (1, 9, 10, 11, 30):
        assert parts(start) == whole[start:]


def test_set_epoch_serves_as_an_ordinary_batch_sampler() -> None:
    sampler = BatchPlanSampler(random_rows(32), 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(first) == len(sampler) == 4


@pytest.mark.parametrize(
    ("size", "ranks", "message"),
    [(6, 1, "multiple of the community"), (8, 3, "over 3 ranks"), (64, 1, "fewer than the batch")],
)
def test_impossible_batches_are_refused(size: int, ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchPlanSampler(communities(5, 4, 0), size, world_size=ranks)
