"""A sentence-transformers model over a Qwen2-VL checkpoint, with last-token pooling and raw prompts.

Without torchvision, upstream's processor class refuses to exist for want of a video processor; the subclass here does
without one. Nothing else of sentence-transformers is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(folder: Path, device: str = "cpu", dtype: str = "float32") -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import AutoTokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    def from_pretrained(name: str, **options: Any) -> Processor:
        images = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 1003520})
        return Processor(images, AutoTokenizer.from_pretrained(name), None)

    from sentence_transformers.base.modules import transformer as module

    module.AutoProcessor.from_pretrained = staticmethod(from_pretrained)
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    backbone = modules.Transformer(
        str(folder),
        model_kwargs={"dtype": dtype},
        modality_config={"text": forward, ("image", "text"): forward},
        module_output_name="token_embeddings",
    )
    pooling = modules.Pooling(backbone.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[backbone, pooling], device=device)
