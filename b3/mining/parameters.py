"""The parameters that decide what a plan is."""

from __future__ import annotations

from dataclasses import dataclass

EDGES = ("union", "mutual")
SEARCHES = ("exact", "ivf")
TARGET_UNITS = ("distinct", "label30")
PARTITIONERS = ("anneal", "paper", "kmeans", "random")
REFINED = ("anneal",)  # those that end in swaps
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
    search: str
    target_unit: str
    subset_rows: int | None
    seed: int

    def budget(self, num_rows: int) -> int:
        """Edges that a row keeps where targets repeat."""
        return max(self.m, SPARE_EDGES // num_rows)
