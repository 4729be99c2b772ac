"""Attention over packed sequences without FlashAttention: no padding outside the attention itself.

Sequences lie end to end in one row of T tokens. FlashAttention takes that as it is. Here, for PyTorch's own kernel,
queries, keys and values of similarly long sequences are laid out as rows padded on the right: where attention is causal
that needs no mask, in a text encoder the padded keys are masked. The vision tower's images, which attend in both
directions and come in few sizes, are grouped by equal size. All other layers run on the T real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# transformers hands sequence boundaries to the vision tower's attention only under a name that says flash.
NAME = "b3_packed_flash"


BUCKET = 1.25  # sequences whose lengths differ by a smaller factor share one padded call


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length.

    tokens: (t,) int64, their places among the packed tokens. rows, columns: (t,) int64, their places in a rectangle of
    count x longest. keys: (count, 1, 1, longest) bool, True for tokens and False for padding; None: attention is
    causal, or nothing is padded.
    """

    tokens: Tensor
    rows: Tensor
    columns: Tensor
    count: int
    longest: int
    keys: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """Where packed sequences begin and end.

    columns: (T,) int64, each token's place in its own sequence. boundaries: (B + 1,) int32 cumulative lengths.
    buckets: every sequence in exactly one.
    """

    columns: Tensor
    boundaries: Tensor
    buckets: list[Bucket]
    longest: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, causal: bool = True) -> Packing:
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        rows = np.repeat(np.arange(len(sizes)), sizes)
        columns = np.arange(starts[-1]) - starts[rows]
        kinds = np.floor(np.log(sizes) / np.log(BUCKET)).astype(np.int64)
        buckets = []
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            place = np.full(len(sizes), -1)
            place[members] = np.arange(len(members))
            tokens = np.flatnonzero(place[rows] >= 0)
            where = [torch.from_numpy(x).to(device) for x in (tokens, place[rows[tokens]], columns[tokens])]
            count, longest, keys = len(members), int(sizes[members].max()), None
            if not causal and len(tokens) < count * longest:
                real = np.arange(longest) < sizes[members, None]
                keys = torch.from_numpy(real).to(device)[:, None, None]
            buckets.append(Bucket(where[0], where[1], where[2], count, longest, keys))
        boundaries = torch.from_numpy(starts.astype(np.int32)).to(device)
        return cls(torch.from_numpy(columns).to(device), boundaries, buckets, int(sizes.max()))


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function for `transformers`: (1, H, T, D) in, (1, T, H, D) out.

    A model of texts passes `packing`; the vision tower passes `cu_seq_lens_q` (boundaries of the images).
    """
    assert attention_mask is None, "packed sequences carry no mask"
    scaling, dropout = options.get("scaling"), options.get("dropout", 0.0)
    packing: Packing | None = options.get("packing")
    if packing is not None:
        return _bucketed(module, query, key, value, packing, scaling, dropout), None
    return _images(module, query, key, value, options["cu_seq_lens_q"], scaling, dropout), None


def _sdpa(
    module: Any,
    parts: list[Tensor],
    causal: bool,
    scaling: float | None,
    dropout: float,
    keys: Tensor | None = None,
) -> Tensor:
    """(B, H, L, D) in, (B, L, H, D) out, by upstream's wrapper (it repeats keys of grouped heads)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *parts, keys, dropout=dropout, scaling=scaling, is_causal=causal)[0]


def _bucketed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, dropout: float
) -> Tensor:
    pieces = []
    for bucket in packing.buckets:
        parts = [_spread(part, bucket) for part in (query, key, value)]
        padded = _sdpa(module, parts, module.is_causal, scaling, dropout, bucket.keys)
        pieces.append(padded[bucket.rows, bucket.columns])
    if len(pieces) == 1:
        return pieces[0][None]
    places = torch.cat([bucket.tokens for bucket in packing.buckets])
    joined = torch.cat(pieces)
    return torch.empty_like(joined).index_copy(0, places, joined)[None]


def _spread(packed: Tensor, bucket: Bucket) -> Tensor:
    """(1, H, T, D) packed to (count, H, longest, D), padded on the right."""
    _, heads, _, width = packed.shape
    padded = packed.new_zeros(bucket.count, bucket.longest, heads, width)
    padded[bucket.rows, bucket.columns] = packed[0].transpose(0, 1)[bucket.tokens]
    return padded.transpose(1, 2)


def _images(
    module: Any, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None, dropout: float
) -> Tensor:
    lengths = (boundaries[1:] - boundaries[:-1]).tolist()
    by_length: dict[int, list[int]] = {}
    start = 0
    for length in lengths:
        by_length.setdefault(length, []).append(start)
        start += length
    _, heads, total, width = query.shape
    result = query.new_empty(total, heads, width)
    pieces, places = [], []
    for length, starts in by_length.items():
        index = torch.tensor(starts, device=query.device)[:, None] + torch.arange(length, device=query.device)
        parts = [part[0][:, index.reshape(-1)].view(heads, len(starts), length, width).transpose(0, 1)
                 for part in (query, key, value)]  # fmt: skip
        pieces.append(_sdpa(module, parts, False, scaling, dropout).reshape(-1, heads, width))
        places.append(index.reshape(-1))
    if len(pieces) == 1:
        return pieces[0][None]
    return result.index_copy(0, torch.cat(places), torch.cat(pieces))[None]


def use_packed_attention(*towers: Any) -> None:
    """Make loaded `transformers` models run `packed_attention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    for tower in towers:
        tower.config._attn_implementation = NAME


def kernel_arguments(packing: Packing, implementation: str) -> dict[str, Any]:
    """What tells a model's attention function where items begin and end."""
    if implementation == NAME:
        return {"packing": packing}
    edges = packing.boundaries
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": packing.longest,
        "max_length_k": packing.longest,
    }
