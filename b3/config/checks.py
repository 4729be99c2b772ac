"""Whether the keys of a recipe that decide over batches fit together."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pydantic import ValidationError

if TYPE_CHECKING:
    from b3.config import Config

_NAME = re.compile(r"[a-z0-9_-]+")


def communities_in_batch(size: int, k: int, random_share: float) -> int:
    """Communities of `k` rows in a batch of `size` rows, a share of which is random: at least one."""
    return max(1, round((1 - random_share) * (size // k)))


def check_batches(config: Config) -> None:
    """Raise `ValueError` with one line on the first contradiction between batch, mining, data and train."""
    _check_variants(config)
    _check_schedule(config)
    _check_policy(config)
    for name in config.batch_plans:
        key = "mining.k" if name == "base" else f"mining.variants.{name}.k"
        _check_size(config, config.mining_of(name).k, key)


def _check_variants(config: Config) -> None:
    mining = config.mining
    used = {name for phase in config.batch.schedule for name in phase.plans}
    for name, variant in mining.variants.items():
        key = f"mining.variants.{name}"
        if name == "base" or not _NAME.fullmatch(name):
            raise ValueError(f"{key}: the name must consist of a-z, 0-9, _ and -, and not be 'base'")
        try:
            section = mining.variant(name)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join((key, *map(str, first["loc"])))
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        if all(getattr(section, k) == getattr(mining, k) for k in variant.replaced):
            raise ValueError(
                f"{key} changes nothing of mining; give it another p, m, k, edges, veto, penalty or partitioner"
            )
        if name not in used:
            raise ValueError(f"{key} is in no phase of batch.schedule; use it there or remove it")


def _check_schedule(config: Config) -> None:
    phases = config.phases()
    if phases is None:
        return
    if not config.batch.mined:
        raise ValueError(f"batch.schedule has no effect with batch.policy {config.batch.policy}; use a b3 policy")
    known = ["base", *config.mining.variants]
    first = 0
    for index, ((until, shares), phase) in enumerate(zip(phases, config.batch.schedule, strict=True)):
        key = f"batch.schedule.{index}"
        if until <= first:
            raise ValueError(
                f"{key}: until {phase.until:g} ends at step {until} of {config.train.steps}, not after step {first}"
                " where the phase begins; phases must increase and have a step each"
            )
        for name, share in shares.items():
            if name not in known:
                raise ValueError(f"{key}: no plan '{name}'; known: {', '.join(known)}")
            if not share > 0:
                raise ValueError(f"{key}: the share {share:g} of plan '{name}' must be above 0")
            if share * (until - first) < 1:
                raise ValueError(f"{key}: share {share:g} of {until - first} steps gives plan '{name}' no batch")
        if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
            raise ValueError(f"{key}: the shares sum to {sum(shares.values()):g}; they must sum to 1")
        first = until
    last = config.batch.schedule[-1].until
    if last != 1:
        raise ValueError(f"batch.schedule ends at {last:g} of training; the last until must be 1.0")


def _check_policy(config: Config) -> None:
    batch, entries = config.batch, config.data.datasets
    if not batch.mined and batch.random_share:
        raise ValueError(
            f"batch.random_share {batch.random_share:g} has no effect with batch.policy {batch.policy}, whose batches"
            " are random; use a b3 policy"
        )
    labelled = sum(entry.family == "classification" for entry in entries)
    if batch.policy == "b3_merged" and labelled < 2:
        raise ValueError(
            f"batch.policy b3_merged merges data sets of family classification, and the recipe has {labelled};"
            " use policy b3"
        )
    if batch.policy == "b3_mixed" and len(entries) < 2:
        raise ValueError("batch.policy b3_mixed mixes data sets, and the recipe has one; use policy b3")


def _check_size(config: Config, k: int, key: str) -> None:
    size, share = config.batch.size, config.batch.random_share
    if size % k:
        lower = max(k, size // k * k)
        raise ValueError(f"batch.size {size} is not a multiple of {key} {k}; use {lower} or {lower + k}")
    group = size // k
    if not share or communities_in_batch(size, k, share) < group:
        return
    smallest = next((i / group for i in range(1, group) if communities_in_batch(size, k, i / group) < group), None)
    limit = "is a single community" if smallest is None else f"is {group} communities, so the next share is"
    raise ValueError(
        f"batch.random_share {share:g} gives no random row: a batch of {size} rows with {key} {k} {limit}"
        + ("; use a smaller k" if smallest is None else f" {smallest:g}")
    )
