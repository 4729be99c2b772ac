"""Weights, rotation, merged pools: exact counts, distinct rows, and nobody left out for long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from b3.errors import InputError
from b3.train import BatchPlanSampler
from b3.train.pools import apportion


@dataclass(frozen=True)
class Plan:
    communities: np.ndarray
    remainder: np.ndarray


def plan(count: int, size: int, extra: int, seed: int) -> Plan:
    """`count` communities of `size` rows and `extra` rows in none."""
    rows = np.random.default_rng(seed).permutation(count * size + extra)
    return Plan(rows[: count * size].reshape(count, size), rows[count * size :])


def all_places(plans: list[Plan]) -> set[tuple[int, int]]:
    return {(d, row) for d, plan in enumerate(plans) for row in range(plan.communities.size + len(plan.remainder))}


def places(batches: np.ndarray) -> list[tuple[int, int]]:
    """(data set, row) of all elements of batches (..., 2), in order."""
    return [(dataset, row) for dataset, row in batches.reshape(-1, 2).tolist()]


@st.composite
def mixtures(draw: st.DrawFn, heaviest: float = 1.0) -> tuple[list[Plan], dict]:
    """Data sets with room for a batch each, and the options of a sampler over them."""
    size, group = draw(st.sampled_from([2, 4])), draw(st.integers(2, 4))
    count = draw(st.integers(1, 4))
    plans = [
        plan(draw(st.integers(group, 5 * group)), size, draw(st.integers(0, size - 1)), seed) for seed in range(count)
    ]
    options = {
        "batch_size": size * group,
        "weights": [draw(st.floats(0.3, heaviest)) for _ in plans],
        "pools": draw(st.sampled_from([list(range(count)), [0] * count, [min(i, 1) for i in range(count)]])),
        "seed": draw(st.integers(0, 2**31)),
    }
    return plans, options


def rows(sampler: BatchPlanSampler, epoch: int) -> np.ndarray:
    """(batches, |B|) row numbers of an epoch, for a sampler of one plan."""
    return sampler.epochs.epoch(epoch)[..., 1]


def build(plans: list[Plan], options: dict) -> BatchPlanSampler:
    """A sampler; only weights within a pool of several data sets may be impossible, such an example is passed over."""
    try:
        return BatchPlanSampler(plans, **options)
    except InputError:
        if len(set(options["pools"])) == len(plans):
            raise
        reject()


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 9))
def test_weights_up_to_one_give_each_row_at_most_once_an_epoch(mixture: tuple, epoch: int) -> None:
    plans, options = mixture
    sampler = BatchPlanSampler(plans, **options)
    used = places(sampler.epochs.epoch(epoch))
    assert len(set(used)) == len(used) == len(sampler) * options["batch_size"]
    assert set(used) <= all_places(plans)


@settings(max_examples=60, deadline=None)
@given(mixtures(heaviest=3.0), st.integers(0, 9))
def test_every_batch_has_distinct_rows_of_one_pool(mixture: tuple, epoch: int) -> None:
    plans, options = mixture
    sampler = build(plans, options)
    batches = sampler.epochs.epoch(epoch)
    assert len(batches) == len(sampler)
    for batch in batches:
        assert len(set(places(batch))) == options["batch_size"]
        assert len({options["pools"][dataset] for dataset, _ in places(batch)}) == 1


@settings(max_examples=60, deadline=None)
@given(mixtures(heaviest=3.0), st.integers(0, 9))
def test_batches_hold_whole_communities(mixture: tuple, epoch: int) -> None:
    """Nearly all: where a community ceded places to the remainder, it differs from the mined one."""
    plans, options = mixture
    sampler = build(plans, options)
    size = plans[0].communities.shape[1]
    mined = {frozenset((d, row) for row in c.tolist()) for d, p in enumerate(plans) for c in p.communities}
    drawn = sampler.epochs.epoch(epoch).reshape(-1, size, 2)
    changed = sum(frozenset(places(community)) not in mined for community in drawn)
    heaviest = max(options["weights"])
    assert changed <= sum(len(p.remainder) > 0 for p in plans) * (heaviest + 2)


@settings(max_examples=60, deadline=None)
@given(mixtures())
def test_every_row_is_used_within_two_turns(mixture: tuple) -> None:
    """Remainder, communities beyond the last batch and weights below 1: each row comes up in ceil(2 C / n) epochs."""
    plans, options = mixture
    sampler = BatchPlanSampler(plans, **options)
    epochs = 0
    for pool in sampler.pools:
        for part, count in zip(pool.parts, pool.passes.sum(axis=0), strict=True):
            epochs = max(epochs, -(-2 * len(part.communities) // int(count)))
    assert {place for epoch in range(epochs) for place in places(sampler.epochs.epoch(epoch))} == all_places(plans)


@settings(max_examples=40, deadline=None)
@given(mixtures(heaviest=3.0))
def test_uses_of_a_data_sets_rows_stay_within_one_of_each_other(mixture: tuple) -> None:
    plans, options = mixture
    plans = [Plan(p.communities, p.communities[0, :0]) for p in plans]
    sampler = build(plans, options)
    uses = np.zeros((len(plans), max(int(p.communities.max()) + 1 for p in plans)), dtype=int)
    for epoch in range(6):
        np.add.at(uses, tuple(sampler.epochs.epoch(epoch).reshape(-1, 2).T), 1)
        for d, p in enumerate(plans):
            of_rows = uses[d, p.communities.ravel()]
            assert of_rows.max() - of_rows.min() <= 1


@settings(max_examples=40, deadline=None)
@given(mixtures(heaviest=3.0), st.sampled_from([1, 2, 3]), st.integers(0, 30))
def test_slices_of_ranks_make_the_batch_that_a_step_names(mixture: tuple, ranks: int, start: int) -> None:
    plans, options = mixture
    if options["batch_size"] % ranks:
        return
    whole = build(plans, options)
    parts = [
        BatchPlanSampler(plans, **options, steps=start + 5, start=start, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    assert [len(part) for part in parts] == [5] * ranks
    batches = [[row for rows in slices for row in rows] for slices in zip(*parts, strict=True)]
    assert batches == [places(whole.batch(step)) for step in range(start, start + 5)]


@pytest.mark.parametrize(("weight", "batches"), [(1, 10), (2, 21), (0.5, 5), (0.1, 1), (0.001, 1), (3.3, 34)])
def test_a_weight_sets_the_number_of_batches(weight: float, batches: int) -> None:
    """83 communities of 4 and 3 rows more: 335 rows, 10.47 batches of 32."""
    other = plan(16, 4, 0, 1)
    sampler = BatchPlanSampler([plan(83, 4, 3, 0), other], 32, weights=[weight, 1])
    assert [pool.num_batches for pool in sampler.pools] == [batches + (weight == 3.3), 2]
    datasets = sampler.epochs.epoch(4)[:, 0, 0].tolist()
    assert datasets.count(0) == batches + (weight == 3.3)


def test_weights_hold_within_a_merged_pool() -> None:
    plans = [plan(40, 4, 0, 0), plan(40, 4, 0, 1), plan(20, 4, 0, 2)]
    sampler = BatchPlanSampler(plans, 16, weights=[1, 0.5, 2], pools=[0, 0, 0])
    datasets = sampler.epochs.epoch(0)[..., 0]
    assert np.bincount(datasets.ravel()).tolist() == [160, 80, 160]
    assert len({tuple(np.unique(batch)) for batch in datasets}) > 1


def test_frozen_batches_keep_their_rows_and_change_their_order() -> None:
    frozen = BatchPlanSampler([plan(21, 4, 1, 0)], 16, frozen=True)
    fresh = BatchPlanSampler([plan(21, 4, 1, 0)], 16)
    first, second, drawn_anew = (
        [tuple(b) for b in e.tolist()] for e in (rows(frozen, 0), rows(frozen, 1), rows(fresh, 1))
    )
    assert set(first) == set(second) and first != second
    assert first == [tuple(b) for b in rows(fresh, 0).tolist()]
    assert set(first).isdisjoint(drawn_anew)


def test_the_remainder_takes_places_in_every_other_turn() -> None:
    small = plan(1, 4, 3, 0)
    sampler = BatchPlanSampler(small, 4)
    for epoch in range(6):
        used = set(rows(sampler, epoch)[0].tolist())
        assert (set(small.remainder.tolist()) <= used) == (epoch % 2 == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.0, 1]}, "weight 0.0 of data set 0 must be a number above 0"),
        ({"weights": [float("inf"), 1]}, "weight inf of data set 0"),
        ({"pools": [0, 0], "weights": [30, 0.01], "batch_size": 32}, "weight 30 of data set 0 would put a row twice"),
        ({"pools": [0, 0], "weights": [0.001, 0.001], "batch_size": 4}, "share 1 communities per epoch"),
    ],
)
def test_what_cannot_be_kept_is_refused(options: dict, message: str) -> None:
    plans = [plan(4, 4, 0, 0), plan(400, 4, 0, 1)]
    with pytest.raises(InputError, match=message):
        BatchPlanSampler(plans, **{"batch_size": 16, **options})


@pytest.mark.parametrize("left_over", [4, 7, 32])
def test_a_remainder_of_several_communities_rotates_too(left_over: int) -> None:
    sampler = BatchPlanSampler(plan(8, 4, left_over, 0), 16)
    seen: set[int] = set()
    for epoch in range(4):  # half of the communities fit into two batches of four; every other turn is ceded
        used = rows(sampler, epoch).ravel().tolist()
        assert len(set(used)) == len(used)
        seen |= set(used)
    assert seen == set(range(32 + left_over))


def test_a_remainder_that_cannot_rotate_is_refused() -> None:
    with pytest.raises(InputError, match="33 rows in no community, more than the 32 in communities"):
        BatchPlanSampler(plan(8, 4, 33, 0), 16)
    with pytest.raises(InputError, match="communities of different sizes"):
        BatchPlanSampler([plan(8, 4, 0, 0), plan(8, 2, 0, 0)], 16, pools=[0, 0])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_apportionment_is_exact_within_bounds_and_near(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    upper = np.array(data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count)))
    lower = np.array([data.draw(st.integers(0, int(u))) for u in upper])
    total = data.draw(st.integers(int(lower.sum()), int(upper.sum())))
    weights = np.array(data.draw(st.lists(st.floats(0.1, 9), min_size=count, max_size=count)))
    ideal = total * weights / weights.sum()
    result = apportion(total, ideal, lower, upper)
    assert result.sum() == total
    assert (lower <= result).all() and (result <= upper).all()
    if (np.ceil(ideal) <= upper).all() and (np.floor(ideal) >= lower).all():
        assert (np.abs(result - ideal) < 1).all()


def test_batches_are_the_same_everywhere() -> None:
    """The draw is a hash, so these rows hold for any version of any library; a change here breaks resumed runs."""
    sampler = BatchPlanSampler(np.arange(27).reshape(9, 3), 6, seed=7)
    assert rows(sampler, 1).tolist() == [
        [15, 16, 17, 18, 19, 20],
        [9, 10, 11, 24, 25, 26],
        [3, 4, 5, 12, 13, 14],
        [0, 1, 2, 21, 22, 23],
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1, 2, 3, 4, 5])), min_size=2, max_size=4),
    st.integers(2, 5),
)
@example([(10, 2), (8, 5), (8, 1)], 4)
@example([(6, 5), (9, 4)], 3)
def test_passes_take_whole_batches_and_no_community_twice(parts: list[tuple[int, float]], group: int) -> None:
    plans = [plan(count, 2, 0, seed) for seed, (count, _) in enumerate(parts)]
    options = {"batch_size": 2 * group, "weights": [w for _, w in parts], "pools": [0] * len(parts)}
    (pool,) = build(plans, options).pools
    assert (pool.passes <= [count for count, _ in parts]).all()
    assert (pool.passes.sum(axis=1) % group == 0).all()
    assert pool.passes.sum() == pool.num_batches * group
    asked = np.array([count * weight for count, weight in parts])
    assert np.abs(pool.passes.sum(axis=0) - asked).max() <= group
