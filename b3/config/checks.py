"""Whether the keys of a recipe that decide over batches fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from b3.config import Config


def check_batches(config: Config) -> None:
    """Raise `ValueError` with one line on the first contradiction between batch, mining, data and train."""
    _check_policy(config)
    if config.batch.mined:
        _check_size(config)


def _check_policy(config: Config) -> None:
    batch, entries = config.batch, config.data.datasets
    labelled = sum(entry.family == "classification" for entry in entries)
    if batch.policy == "b3_merged" and labelled < 2:
        raise ValueError(
            f"batch.policy b3_merged merges data sets of family classification, and the recipe has {labelled};"
            " use policy b3"
        )
    if batch.policy == "b3_mixed" and len(entries) < 2:
        raise ValueError("batch.policy b3_mixed mixes data sets, and the recipe has one; use policy b3")


def _check_size(config: Config) -> None:
    size, k = config.batch.size, config.mining.community_size
    if size % k:
        lower = max(k, size // k * k)
        raise ValueError(f"batch.size {size} is not a multiple of mining.k {k}; use {lower} or {lower + k}")
