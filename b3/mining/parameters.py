"""The parameters that decide what a plan is."""

from __future__ import annotations

from dataclasses import dataclass

from b3.mining.rankings import Limits

EDGES = ("union", "mutual")
SEARCHES = ("exact", "ivf")
TARGET_UNITS = ("distinct", "label30")
PARTITIONERS = ("anneal", "metis", "paper", "kmeans", "random")
REFINED = ("anneal", "metis")  # those that end in swaps
SPARE_EDGES = 1_500_000  # where targets repeat, a small data set keeps more than m edges a row, up to this many in all


@dataclass(frozen=True)
class Parameters:
    """As in the manifest of a plan; see `b3.mining.mine.mine` for the meaning of each."""

    p: int
    m: int
    K: int
    h: int
    edges: str
    veto: bool
    partitioner: str
    refine_passes: int
    piece_rows: int | None
    max_similarity: float | None
    max_relative: float | None
    search: str
    target_unit: str
    subset_rows: int | None
    seed: int

    @property
    def limits(self) -> Limits | None:
        """The limits on similarity, if there are any."""
        if self.max_similarity is None and self.max_relative is None:
            return None
        return Limits(self.max_similarity, self.max_relative)

    def budget(self, num_rows: int) -> int:
        """Edges that a row keeps where targets repeat."""
        return max(self.m, SPARE_EDGES // num_rows)
