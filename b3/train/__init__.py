"""Training: the loss, the cached step, the batch plan as sampler, and the loop around them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["BatchPlanSampler", "info_nce"]

if TYPE_CHECKING:
    from b3.train.losses.info_nce import info_nce
    from b3.train.sampler import BatchPlanSampler


def __getattr__(name: str) -> Any:
    modules = {"info_nce": "b3.train.losses.info_nce", "BatchPlanSampler": "b3.train.sampler"}
    if name not in modules:
        raise AttributeError(f"module 'b3.train' has no attribute '{name}'")
    return getattr(import_module(modules[name]), name)
