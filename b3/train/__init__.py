"""Training: the loss, the cached step, the batch plan as sampler, and the trainer around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["BatchPlanSampler", "info_nce"]

if TYPE_CHECKING:
    from b3.train.losses.info_nce import info_nce
    from b3.train.sampler import BatchPlanSampler


def __getattr__(name: str) -> Any:
    if name == "info_nce":
        from b3.train.losses.info_nce import info_nce

        return info_nce
    if name == "BatchPlanSampler":
        from b3.train.sampler import BatchPlanSampler

        return BatchPlanSampler
    raise AttributeError(f"module 'b3.train' has no attribute '{name}'")
