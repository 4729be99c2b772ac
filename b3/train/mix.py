"""Which plan a step takes its batch from, where several are mixed over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from b3.mining.hashing import mix64, uniform
from b3.train.pools import apportion

_PLAN_OF_STEP = 7  # tells these hashes from those of the pools


class Schedule:
    """The plan of every step and how many earlier steps had the same one: a function of (phases, seed).

    Within a phase each plan has its share of the steps, exact to a step and evenly spread.

    Args:
        phases: (first step after the phase, share of the steps by name of plan) in order; the shares sum to 1, and a
            share is at least one step.
        steps: of the whole training; the last phase ends there.
        seed: of the order.
    """

    def __init__(self, phases: Sequence[tuple[int, Mapping[str, float]]], steps: int, seed: int) -> None:
        assert phases and phases[-1][0] == steps, "the last phase ends with training"
        self.phases = [(until, dict(shares)) for until, shares in phases]
        self.names = list(dict.fromkeys(name for _, shares in self.phases for name in shares))
        plans, first = [], 0
        for number, (until, shares) in enumerate(self.phases):
            assert until > first, "phases follow each other"
            plans.append(self._phase(number, until - first, shares, seed))
            first = until
        self._plan_of = np.concatenate(plans)
        self._index = np.empty(steps, dtype=np.int64)
        for plan in range(len(self.names)):
            where = np.flatnonzero(self._plan_of == plan)
            self._index[where] = np.arange(len(where))

    def _phase(self, number: int, length: int, shares: Mapping[str, float], seed: int) -> np.ndarray:
        """(length,) int16 plan numbers; the i-th of n steps of a plan falls into the i-th n-th of the phase."""
        ideal = np.array(list(shares.values())) * length
        counts = apportion(length, ideal, np.zeros(len(ideal), np.int64), np.full(len(ideal), length))
        plans, places = [], []
        for name, count in zip(shares, counts, strict=True):
            plan, index = self.names.index(name), np.arange(count, dtype=np.int64)
            plans.append(np.full(count, plan, dtype=np.int16))
            places.append((index + uniform(mix64(seed, _PLAN_OF_STEP, number, plan, index))) / max(count, 1))
        order = np.argsort(np.concatenate(places), kind="stable")
        result: np.ndarray = np.concatenate(plans)[order]
        return result

    def at(self, step: int) -> tuple[str, int]:
        """(name of the plan, number of earlier steps that had it) of a step."""
        return self.names[self._plan_of[step]], int(self._index[step])
