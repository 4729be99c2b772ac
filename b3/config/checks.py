"""Whether the keys of a recipe that decide over batches fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from b3.config import Config


def communities_in_batch(size: int, k: int, random_share: float) -> int:
    """Communities of `k` rows in a batch of `size` rows, a share of which is random: at least one."""
    return max(1, round((1 - random_share) * (size // k)))


def check_batches(config: Config) -> None:
    """Raise `ValueError` with one line on the first contradiction between batch, mining, data and train."""
    _check_policy(config)
    if config.batch.mined:
        _check_size(config)


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


def _check_size(config: Config) -> None:
    size, k, share = config.batch.size, config.mining.k, config.batch.random_share
    if size % k:
        lower = max(k, size // k * k)
        raise ValueError(f"batch.size {size} is not a multiple of mining.k {k}; use {lower} or {lower + k}")
    group = size // k
    if not share or communities_in_batch(size, k, share) < group:
        return
    smallest = next((i / group for i in range(1, group) if communities_in_batch(size, k, i / group) < group), None)
    limit = "is a single community" if smallest is None else f"is {group} communities, so the next share is"
    raise ValueError(
        f"batch.random_share {share:g} gives no random row: a batch of {size} rows with mining.k {k} {limit}"
        + ("; use a smaller k" if smallest is None else f" {smallest:g}")
    )
