"""The data sets that a recipe names."""

from __future__ import annotations

from b3.config import Config, DatasetConfig
from b3.data.datasets import PairDataset
from b3.data.tables import load_pairs


def load_dataset(config: Config, entry: DatasetConfig) -> PairDataset:
    """One training data set of a recipe; raises `DataError` as `load_pairs`."""
    data = config.data
    return load_pairs(
        entry.source or data.source,
        entry.subset,
        entry.split or data.split,
        family=entry.family,
        image_dir=entry.image_dir or data.image_dir,
        prefix_targets=data.prefix_targets,
        max_rows=entry.max_rows,
    )


def load_datasets(config: Config) -> list[PairDataset]:
    """All training data sets, in the recipe's order."""
    return [load_dataset(config, entry) for entry in config.data.datasets]
