"""What can be wrong with the arrays and the parameters of mining, each in one clear line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from b3.errors import InputError
from b3.mining.labels import label_count
from b3.mining.negatives import NegativeRules
from b3.mining.parameters import EDGES, PARTITIONERS, REFINED, SEARCHES, TARGET_UNITS, Parameters


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
    least = {"p": 0, "m": 1, "K": 1, "h": 0, "seed": 0, "refine_passes": 0, "block_rows": 1}
    given = vars(chosen) | {"refine_passes": refine_passes, "block_rows": 1 if block_rows is None else block_rows}
    names = {"K": "community_size", "h": "hard_negatives"}
    for key, low in least.items():
        _check_integer(names.get(key, key), given[key], low)
    if count < chosen.K:
        raise InputError(f"community_size {chosen.K} exceeds the {count} rows; give at most {count}")
    for key, known in (
        ("edges", EDGES), ("partitioner", PARTITIONERS), ("search", SEARCHES), ("target_unit", TARGET_UNITS)
    ):  # fmt: skip
        if given[key] not in known:
            raise InputError(f"{key} is {given[key]!r}; choose from {', '.join(known)}")
    if chosen.partitioner == "paper" and chosen.edges != "mutual":
        raise InputError(f"partitioner paper works on mutual edges, not {chosen.edges}; leave edges out")
    if chosen.target_unit == "label30" and chosen.edges != "mutual":
        raise InputError(f"target_unit label30 works on mutual edges, not {chosen.edges}; leave edges out")
    if chosen.target_unit == "label30" and chosen.piece_rows is not None:
        raise InputError("target_unit label30 knows no piece_rows; leave it out")
    if chosen.subset_rows is not None:
        _check_integer("subset_rows", chosen.subset_rows, chosen.K)
    if chosen.piece_rows is not None:
        _check_integer("piece_rows", chosen.piece_rows, 2 * chosen.K)
        if chosen.partitioner not in REFINED:
            raise InputError(f"piece_rows has no effect with partitioner {chosen.partitioner}; leave it out")


def _check_integer(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}; give an integer of at least {low}")


def check_rules(rules: NegativeRules | None, hard_negatives: int) -> NegativeRules:
    """The rules, or the default ones. Raises `InputError` for rules without effect or out of range."""
    if rules is not None and not hard_negatives:
        raise InputError("negative_rules have no effect with hard_negatives 0; leave them out, or draw some")
    rules = rules or NegativeRules()
    rules.check()
    return rules


def windows(chosen: Parameters, rules: NegativeRules, num_targets: int) -> tuple[Parameters, int, int]:
    """(parameters with the p and m that count, width of the window, width of the window of hard negatives)."""
    wanted = rules.window or chosen.m
    if chosen.target_unit == "label30":
        chosen = replace(chosen, p=0, m=label_count(num_targets))
        wanted = rules.window or 2 * chosen.h
    width = _window_width(chosen, num_targets)
    own = 1 if chosen.target_unit == "label30" else 0  # the own label has no rank there
    most = num_targets - chosen.p - own
    return chosen, min(width, most), min(wanted, most) if chosen.h else 0


def _window_width(chosen: Parameters, num_targets: int) -> int:
    """m, clipped to the ranks that exist."""
    if num_targets < 2:
        raise InputError("all rows have the same target, so there are no negatives; mining needs two distinct targets")
    if chosen.p >= num_targets - 1:
        raise InputError(
            f"p {chosen.p} leaves no ranks: there are {num_targets} distinct targets; give at most {num_targets - 2}"
        )
    return min(chosen.m, num_targets - chosen.p)
