"""Frozen weights spread over the ranks (FSDP2), for backbones that do not fit on one GPU beside their activations.

Only the frozen weights of the decoder layers are sharded; each layer is put together while it runs. The adapter stays
whole on every rank, so the cached step, its one gradient reduction, the optimiser and the checkpoints are those of an
unsharded run, and so are the results. What sharding asks for is that all ranks run the layers equally often: ranks with
fewer chunks than others run an empty one (`equal_chunks`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn
from torch.nn.functional import pad

from b3.errors import RunError
from b3.model.embedder import Embedder
from b3.train.inputs import StepInputs


def shard_frozen(embedder: Embedder) -> None:
    """Shard in place, over all ranks. Raises `RunError` if nothing in the decoder layers is trained."""
    from torch.distributed.fsdp import fully_shard

    layers = embedder.layers()
    if not any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise RunError("model.shard needs an adapter in the decoder layers; see adapter.target_modules")
    for layer in layers:
        fully_shard(layer, ignored_params={p for p in layer.parameters() if p.requires_grad})
    language = _holder(embedder, layers)
    inside = {p for layer in layers for p in layer.parameters()}
    whole = {p for p in language.parameters() if p.requires_grad or p not in inside}
    fully_shard(language, ignored_params=whole)  # lets the layers fetch ahead of each other


def _holder(embedder: Embedder, layers: list[nn.Module]) -> nn.Module:
    """The innermost module that runs all the layers."""
    holders = [m for m in embedder.modules() if not isinstance(m, nn.ModuleList) and set(layers) <= set(m.modules())]
    return holders[-1]


def equal_chunks(inputs: StepInputs, count: int) -> StepInputs:
    """The inputs with empty chunks up to `count`: one token each, an item that no row refers to, gradient zero."""
    missing, items = max(0, count - inputs.num_chunks), inputs.num_items
    return replace(
        inputs,
        input_ids=pad(inputs.input_ids, (0, missing)),
        lengths=[*inputs.lengths, *[1] * missing],
        positions=None if inputs.positions is None else pad(inputs.positions, (0, missing)),
        is_slot=pad(inputs.is_slot, (0, missing)),
        images_of=[*inputs.images_of, *[[]] * missing],
        groups=[*inputs.groups, *(np.array([items + k]) for k in range(missing))],
    )
