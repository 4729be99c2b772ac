"""A teacher's vectors of the training rows, for the mask that reads its scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from b3.config import Config
from b3.errors import RunError

if TYPE_CHECKING:
    import numpy as np

    from b3.data.datasets import PairDataset


def open_teachers(config: Config, datasets: list[PairDataset]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """(queries, targets), each (N, D) and memory-mapped, of every data set; None if no option reads them.

    Raises:
        RunError: the recipe's teacher is a checkpoint, not vectors.
        DataError: a file is missing or does not fit its data set.
    """
    from b3.mining.teacher import teacher_embeddings

    if config.train.mask_teacher_margin is None:
        return None
    teacher = config.mining.teacher
    if teacher != "embedded" and (not Path(teacher).is_dir() or (Path(teacher) / "config.json").exists()):
        raise RunError(
            f"train.mask_teacher_margin reads vectors while training, but mining.teacher {teacher} is a checkpoint;"
            " encode the data sets with scripts/embed.py and give the folder of SUBSET_queries.npy, SUBSET_targets.npy"
        )
    pairs = zip(config.data.datasets, datasets, strict=True)
    return [teacher_embeddings(config, entry, dataset, None) for entry, dataset in pairs]
