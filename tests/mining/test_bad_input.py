"""What cannot be mined is named; what looks odd but can be mined gives the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from b3.errors import InputError
from b3.mining import BatchPlan, mine

RNG = np.random.default_rng(3)
TARGETS = RNG.normal(size=(64, 8)).astype(np.float16)
QUERIES = (TARGETS + 0.5 * RNG.normal(size=TARGETS.shape)).astype(np.float16)
OPTIONS: dict[str, Any] = {"p": 2, "m": 10, "community_size": 6, "hard_negatives": 2}


def pair() -> tuple[np.ndarray, np.ndarray]:
    return QUERIES.astype(np.float32), TARGETS.astype(np.float32)


def refuse(message: str, queries: Any, targets: Any, **change: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        mine(queries, targets, **OPTIONS | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["queries", "targets"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 17, 63])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_rows_that_are_not_finite_are_named(side: str, value: float, row: int, dtype: type) -> None:
    arrays = dict(zip(("queries", "targets"), (a.astype(dtype) for a in pair()), strict=True))
    arrays[side][row, 5] = value
    refuse(rf"^row {row} of the {side} has NaN or infinite values; encode it again or drop it$", **arrays)


@pytest.mark.parametrize("side", ["queries", "targets"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_vectors_are_named(side: str, zero: float) -> None:
    arrays = dict(zip(("queries", "targets"), pair(), strict=True))
    arrays[side][11] = zero
    refuse(rf"^row 11 of the {side} is a zero vector, which has no direction; encode it again or drop it$", **arrays)


def test_the_first_of_several_bad_rows_is_named_and_counted() -> None:
    queries, targets = pair()
    queries[[9, 21, 40]] = np.nan
    queries[4] = 0
    refuse(r"row 9 of the queries has NaN.*\(3 such rows", queries, targets)
    queries, targets = pair()
    targets[[30, 31]] = 0
    refuse(r"row 30 of the targets is a zero vector.*\(2 such rows", queries, targets)


def test_a_bad_row_far_down_is_named_by_its_own_number() -> None:
    queries = np.ones((20_000, 2), dtype=np.float32)
    queries[17_321, 1] = np.nan
    refuse("row 17321 of the queries", queries, np.ones((20_000, 2), dtype=np.float32))


def test_a_tiny_or_huge_vector_is_not_a_zero_one() -> None:
    queries, targets = (a.astype(np.float64) for a in pair())
    expected = mine(queries, targets, **OPTIONS)
    queries[3] *= 2.0**-1000
    targets[4] *= 2.0**1000
    assert same(expected, mine(queries, targets, **OPTIONS))


def test_dimension_mismatch() -> None:
    queries, targets = pair()
    refuse("^queries have 7 dimensions, targets 8; use one teacher for both$", queries[:, :7], targets)
    refuse("^queries have 8 dimensions, targets 5;", queries, targets[:, :5])


def test_different_lengths() -> None:
    queries, targets = pair()
    refuse("^63 queries but 64 targets; row i of both must be one training pair$", queries[:63], targets)
    refuse("^64 queries but 1 targets", queries, targets[:1])


@pytest.mark.parametrize("shape", [(64,), (8, 8, 8), (), (64, 0)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    refuse("queries have shape .*; give an array of shape", np.ones(shape, dtype=np.float32), pair()[1])


@pytest.mark.parametrize("dtype", [np.int8, bool, complex, object, "U3"])
def test_other_types(dtype: Any) -> None:
    refuse("targets have type .*; give float16, float32 or float64", pair()[0], np.ones((64, 8)).astype(dtype))


def test_no_rows() -> None:
    refuse("no rows to mine", np.empty((0, 8), dtype=np.float32), np.empty((0, 8), dtype=np.float32))


@pytest.mark.parametrize("partitioner", ["anneal", "paper", "kmeans", "random"])
class TestSizes:
    def test_k_above_n(self, partitioner: str) -> None:
        message = "^community_size 65 exceeds the 64 rows; give at most 64$"
        refuse(message, *pair(), community_size=65, partitioner=partitioner)

    def test_k_equal_to_n_is_one_community(self, partitioner: str) -> None:
        plan = mine(*pair(), **OPTIONS | {"community_size": 64}, partitioner=partitioner)
        assert np.array_equal(plan.communities, np.arange(64)[None]) and plan.remainder.size == 0
        assert (plan.hard_negatives == -1).all(), "every target belongs to a member"
        assert plan.report["teacher_mass_captured"] == pytest.approx(1, abs=0.2)
        assert plan.report["mined_negatives_per_query"] == pytest.approx(
            plan.report["random_mined_negatives_per_query"]
        )

    def test_k_of_one_is_every_row_alone(self, partitioner: str) -> None:
        plan = mine(*pair(), **OPTIONS | {"community_size": 1}, partitioner=partitioner)
        assert np.array_equal(plan.communities, np.arange(64)[:, None]) and plan.remainder.size == 0
        assert plan.report["mined_negatives_per_query"] == plan.report["teacher_mass_captured"] == 0
        assert plan.hard_negatives is not None and (plan.hard_negatives != np.arange(64)[:, None]).all()

    def test_one_row(self, partitioner: str) -> None:
        message = "all rows have the same target, so there are no negatives; mining needs two distinct targets"
        queries, targets = pair()
        refuse(message, queries[:1], targets[:1], p=0, m=1, community_size=1, partitioner=partitioner)

    def test_two_rows(self, partitioner: str) -> None:
        queries, targets = pair()
        options = {"p": 0, "m": 1, "community_size": 2, "hard_negatives": 1}
        plan = mine(queries[:2], targets[:2], **options, partitioner=partitioner)  # type: ignore[arg-type]
        assert np.array_equal(plan.communities, [[0, 1]])

    def test_p_too_large(self, partitioner: str) -> None:
        queries, targets = pair()
        options = {"partitioner": partitioner}
        refuse("p 63 leaves no ranks: there are 64 distinct targets; give at most 62", *pair(), **options, p=63)
        refuse("p 100000 leaves no ranks", *pair(), **options, p=100_000)
        refuse("there are 5 distinct targets; give at most 3", queries, targets[np.arange(64) % 5], **options, p=4)
        last = mine(*pair(), **OPTIONS | options | {"p": 62})
        assert last.report["window"] == [62, 64] and last.communities.shape == (10, 6)

    def test_all_rows_identical(self, partitioner: str) -> None:
        message = "all rows have the same target, so there are no negatives; mining needs two distinct targets"
        alike = np.full((64, 8), 0.3, dtype=np.float32)
        refuse(message, alike, alike, p=0, partitioner=partitioner)
        refuse(message, pair()[0], alike, p=0, partitioner=partitioner)
        refuse(message, pair()[0], alike * np.linspace(1, 2, 64)[:, None].round(), p=0, partitioner=partitioner)

    def test_identical_queries_can_be_mined(self, partitioner: str) -> None:
        queries = np.tile(pair()[0][:1], (64, 1))
        plan = mine(queries, pair()[1], **OPTIONS, partitioner=partitioner)
        used = np.concatenate([plan.communities.ravel(), plan.remainder])
        assert np.array_equal(np.sort(used), np.arange(64))


def same(a: BatchPlan, b: BatchPlan) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("communities", "remainder", "hard_negatives"))
    reports = [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory_bytes")} for r in (a.report, b.report)]
    return arrays and reports[0] == reports[1]


def mapped(array: np.ndarray, folder: Path, order: str = "C") -> np.ndarray:
    file = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(file, np.asarray(array, order=order))  # type: ignore[call-overload]
    return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "form",
    ["float16", "float64", "big-endian", "fortran", "fortran16", "strided", "reversed", "mapped", "mapped16-fortran",
     "read-only", "list", "unaligned"],
)  # fmt: skip
@pytest.mark.parametrize("repeated", [False, True])
def test_the_form_of_the_arrays_does_not_matter(form: str, repeated: bool, tmp_path: Path) -> None:
    base = [a[np.arange(64) % 25] if repeated and side else a for side, a in enumerate(pair())]
    expected = mine(*base, **OPTIONS)

    def change(array: np.ndarray) -> Any:
        wide = np.zeros((128, 16), dtype=np.float32)
        wide[::2, ::2] = array
        packed = np.zeros(array.nbytes + 1, dtype=np.uint8)
        packed[1:] = np.frombuffer(array.tobytes(), dtype=np.uint8)
        frozen = array.copy()
        frozen.flags.writeable = False
        return {
            "float16": lambda: array.astype(np.float16),
            "float64": lambda: array.astype(np.float64),
            "big-endian": lambda: array.astype(">f4"),
            "fortran": lambda: np.asfortranarray(array),
            "fortran16": lambda: np.asfortranarray(array.astype(np.float16)),
            "strided": lambda: wide[::2, ::2],
            "reversed": lambda: array[::-1].copy()[::-1],
            "mapped": lambda: mapped(array, tmp_path),
            "mapped16-fortran": lambda: mapped(array.astype(np.float16), tmp_path, "F"),
            "read-only": lambda: frozen,
            "list": array.tolist,
            "unaligned": lambda: packed[1:].view(np.float32).reshape(array.shape),
        }[form]()

    made = [change(array) for array in base]
    assert all(np.array_equal(a, b) for a, b in zip(made, base, strict=True)), "the same values"
    found = mine(*made, **OPTIONS)
    assert same(expected, found)
    kept = form in ("big-endian", "fortran", "strided", "reversed", "mapped", "read-only", "unaligned")
    prints = [plan.manifest["embeddings_fingerprint"] for plan in (expected, found)]
    assert (prints[0] == prints[1]) == kept, "the fingerprint tells types apart, not memory order"


def test_scale_does_not_matter() -> None:
    queries, targets = pair()
    assert same(mine(queries, targets, **OPTIONS), mine(queries * 8, targets / 4, **OPTIONS))


def test_the_arrays_given_are_not_changed() -> None:
    queries, targets = pair()
    mine(queries, targets, **OPTIONS)
    assert all(np.array_equal(a, b) for a, b in zip((queries, targets), pair(), strict=True))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_integers(integer: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "seed": 3, "refine_passes": 2}
    expected = mine(*pair(), **options)
    found = mine(*pair(), **{key: integer(value) for key, value in options.items()}, veto=np.bool_(True))  # type: ignore
    assert same(expected, found)
    found.save(tmp_path / "plan")
    expected.save(tmp_path / "plan")  # the same plan


@pytest.mark.parametrize("seed", [2**31, 2**63 - 1, 2**64 - 1, 2**70, np.int64(2**63 - 1), np.uint64(2**64 - 1)])
def test_large_seeds(seed: Any, tmp_path: Path) -> None:
    plan = mine(*pair(), **OPTIONS, seed=seed)
    plan.save(tmp_path / "plan")
    assert BatchPlan.load(tmp_path / "plan", {"seed": int(seed)}).manifest["seed"] == int(seed)


@pytest.mark.parametrize("name", ["p", "m", "community_size", "hard_negatives", "seed", "refine_passes"])
@pytest.mark.parametrize("value", [-1, 1.5, 2.0, "3", True, np.float64(2), np.int64(-1)])
def test_parameters_that_are_no_counts_are_named(name: str, value: Any) -> None:
    refuse(f"^{name} is .*: input should be .*", *pair(), **{name: value})
