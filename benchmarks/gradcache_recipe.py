"""The plain cached-gradient recipe, as VLM2Vec and the first B3 code train: the slow arm of `train_step.py`.

Each side is padded on the left to its longest item, whole batch at once; chunks are slices of a fixed number of items;
every chunk runs the vision tower and the language model twice; repeated items and images are encoded again. The
classes are upstream's. The language head is left out (the published code computes it for every token), in its favour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from b3.model.backbones.qwen_vl_images import CLIP
from b3.model.batch import Processed


def padded(items: list[Processed]) -> dict[str, Any]:
    """One side of a batch, padded on the left to its longest item."""
    longest = max(item.num_tokens for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, longest - item.num_tokens :] = torch.from_numpy(item.input_ids)
        mask[row, longest - item.num_tokens :] = 1
    images = [item.visuals[0] if item.visuals else None for item in items]
    pixels = [CLIP.numbers(torch.from_numpy(image.patches)) if image is not None else None for image in images]
    return {"ids": ids, "mask": mask, "pixels": pixels, "grids": [image and image.grid[1:] for image in images]}


def chunks(side: dict[str, Any], size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Slices of `size` items as keyword arguments of upstream's model."""
    for start in range(0, len(side["ids"]), size):
        part = slice(start, start + size)
        mask = side["mask"][part]
        arguments = {
            "input_ids": side["ids"][part],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1),
        }
        pixels = [p for p in side["pixels"][part] if p is not None]
        if pixels:
            arguments["pixel_values"] = torch.cat(pixels)
            arguments["image_grid_thw"] = torch.tensor([(1, *g) for g in side["grids"][part] if g is not None])
        yield {name: value.to(device) for name, value in arguments.items()}


def embed(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return normalize(model(**arguments, use_cache=False).last_hidden_state[:, -1].float(), dim=-1)


def step(model: Any, sides: list[dict[str, Any]], size: int, temperature: float = 0.02) -> float:
    """Loss of a batch (queries, targets); gradients are in `.grad` afterwards."""
    cached, states = [], []
    for side in sides:
        vectors = []
        for arguments in chunks(side, size, model.device):
            states.append(torch.get_rng_state())
            with torch.no_grad():
                vectors.append(embed(model, arguments))
        cached.append(torch.cat(vectors).requires_grad_(True))
    loss = cross_entropy(cached[0] @ cached[1].T / temperature, torch.arange(len(cached[0]), device=model.device))
    loss.backward()
    replay = iter(states)
    for side, leaf in zip(sides, cached, strict=True):
        assert leaf.grad is not None
        start = 0
        for arguments in chunks(side, size, model.device):
            torch.set_rng_state(next(replay))
            vectors = embed(model, arguments)
            torch.sum(vectors * leaf.grad[start : start + len(vectors)]).backward()
            start += len(vectors)
    return float(loss.detach())
