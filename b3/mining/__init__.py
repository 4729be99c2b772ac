"""Batch mining: group the rows of a data set so that those that share a batch are hard negatives of each other."""

from __future__ import annotations

from b3.mining.mine import mine
from b3.mining.plan import BatchPlan

__all__ = ["BatchPlan", "mine"]
