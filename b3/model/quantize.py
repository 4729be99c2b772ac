"""Frozen decoder layers in 4 bit, under an adapter: QLoRA (arXiv 2305.14314), by bitsandbytes.

Each block of 64 weights becomes its largest magnitude and, for each weight, the nearest of 16 values between -1 and 1
(NF4, quantiles of a normal distribution); the magnitudes are rounded to 8 bits as well. A layer computes with the
weights that these stand for. Embeddings and the vision tower stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from b3.errors import InputError
from b3.model.embedder import Embedder


def quantize_layers(embedder: Embedder, compute: torch.dtype) -> int:
    """Replace the linear layers of an embedder's decoder layers, on whatever device they are; returns their number.

    Args:
        embedder: without an adapter.
        compute: dtype of their products.

    Raises `InputError` if the model has no decoder layers.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = [m for layer in embedder.layers() for m in layer.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise InputError(f"model.quantize is for decoder layers, and {embedder.title} has none; leave it out")
    replaced: dict[nn.Module, nn.Module] = {}
    for module in linear:
        bias, device = module.bias is not None, module.weight.device
        four = Linear4bit(module.in_features, module.out_features, bias, compute, True, "nf4", device="meta")
        four.weight = Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        if bias:
            four.bias = module.bias
        replaced[module] = four.to(device)  # which is when its weight is rounded
        module.weight.data = torch.empty(0)
    for parent in embedder.backbone.modules():
        for name, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    backbone: Any = embedder.backbone
    backbone.is_loaded_in_4bit = True  # what peft asks before it chooses how to adapt a layer
    return len(linear)
