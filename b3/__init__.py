"""b3: training and evaluation of multimodal embedding models with mined batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__"]

if TYPE_CHECKING:
    from b3.model.embedder import Embedder


def __getattr__(name: str) -> Any:
    if name == "Embedder":  # imported on use: torch and transformers take seconds
        from b3.model.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'b3' has no attribute '{name}'")
