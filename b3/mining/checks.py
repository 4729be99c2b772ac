"""What can be wrong with the arrays and the parameters of mining, each in one clear line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from b3.errors import InputError
from b3.mining.communities import PARTITIONERS, REFINED, Cut
from b3.mining.rank import Limits

EDGES = ("union", "mutual")
SEARCHES = ("exact", "ivf")
MOST_PENALTY = 60  # weights are int8


@dataclass(frozen=True)
class Parameters:
    """The parameters that decide what a plan is, as in the manifest; see `b3.mining.mine.mine`."""

    p: int
    m: int
    K: int
    h: int
    edges: str
    veto: bool
    penalty: int
    partitioner: str
    refine_passes: int
    piece_rows: int | None
    max_similarity: float | None
    max_relative: float | None
    search: str
    seed: int

    @property
    def limits(self) -> Limits | None:
        if self.max_similarity is None and self.max_relative is None:
            return None
        return Limits(self.max_similarity, self.max_relative)

    @property
    def cut(self) -> Cut:
        return Cut(
            self.p, self.m, self.K, self.edges, self.veto, self.penalty, self.partitioner, self.refine_passes,
            self.piece_rows, self.seed,
        )  # fmt: skip


def check_arrays(queries: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    queries, targets = (a if isinstance(a, np.ndarray) else np.asarray(a) for a in (queries, targets))
    for side, array in (("queries", queries), ("targets", targets)):
        if array.ndim != 2 or array.shape[1] == 0:
            raise InputError(f"{side} have shape {array.shape}; give an array of shape (N, D)")
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(f"{side} have type {array.dtype}; give float16, float32 or float64")
    if len(queries) != len(targets):
        raise InputError(f"{len(queries)} queries but {len(targets)} targets; row i of both must be one training pair")
    if queries.shape[1] != targets.shape[1]:
        raise InputError(
            f"queries have {queries.shape[1]} dimensions, targets {targets.shape[1]}; use one teacher for both"
        )
    if len(queries) == 0:
        raise InputError("there are no rows to mine (N = 0)")
    return queries, targets


def check_parameters(chosen: Parameters, count: int, refine_passes: int, block_rows: int | None) -> None:
    """Raise `InputError` for a value out of range or one that would have no effect."""
    least = {"p": 0, "m": 1, "K": 1, "h": 0, "seed": 0, "penalty": 0, "refine_passes": 0, "block_rows": 1}
    given = vars(chosen) | {"refine_passes": refine_passes, "block_rows": 1 if block_rows is None else block_rows}
    names = {"K": "community_size", "h": "hard_negatives"}
    for key, low in least.items():
        _check_integer(names.get(key, key), given[key], low)
    if count < chosen.K:
        raise InputError(f"community_size {chosen.K} exceeds the {count} rows; give at most {count}")
    for key, known in (("edges", EDGES), ("partitioner", PARTITIONERS), ("search", SEARCHES)):
        if given[key] not in known:
            raise InputError(f"{key} is {given[key]!r}; choose from {', '.join(known)}")
    if chosen.partitioner == "paper" and chosen.edges != "mutual":
        raise InputError(f"partitioner paper works on mutual edges, not {chosen.edges}; leave edges out")
    if chosen.penalty and (chosen.edges != "union" or not chosen.veto):
        raise InputError(f"penalty {chosen.penalty} needs union edges with the veto; leave edges and veto out")
    if chosen.penalty > MOST_PENALTY:
        raise InputError(f"penalty is {chosen.penalty}; give at most {MOST_PENALTY}")
    if chosen.penalty and chosen.partitioner not in REFINED:
        raise InputError(f"penalty {chosen.penalty} has no effect with partitioner {chosen.partitioner}")
    if chosen.piece_rows is not None:
        _check_integer("piece_rows", chosen.piece_rows, 2 * chosen.K)
        if chosen.partitioner not in REFINED:
            raise InputError(f"piece_rows has no effect with partitioner {chosen.partitioner}; leave it out")
    if chosen.max_relative is not None and not chosen.max_relative > 0:
        raise InputError(f"max_relative is {chosen.max_relative}; give a positive share of the positive's similarity")


def _check_integer(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}; give an integer of at least {low}")


def window_width(chosen: Parameters, num_targets: int) -> int:
    """m, clipped to the ranks that exist."""
    if num_targets < 2:
        raise InputError("all rows have the same target, so there are no negatives; mining needs two distinct targets")
    if chosen.p >= num_targets - 1:
        raise InputError(
            f"p {chosen.p} leaves no ranks: there are {num_targets} distinct targets; give at most {num_targets - 2}"
        )
    return min(chosen.m, num_targets - chosen.p)
