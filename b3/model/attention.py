"""Attention over packed sequences without FlashAttention: no padding outside the attention itself.

Sequences lie end to end in one row of T tokens. FlashAttention takes that as it is. Here, for PyTorch's own kernel, the
causal language model's queries, keys and values are laid out as rows padded on the right (where causal attention needs
no mask), and the vision tower's pictures, which attend in both directions, are grouped by equal size. All other layers
run on the T real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# transformers hands sequence boundaries to the vision tower's attention only under a name that says flash.
NAME = "b3_packed_flash"


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each of T packed tokens lies. `rows`, `columns`: (T,) int64; `lengths`: (B,) int64."""

    rows: Tensor
    columns: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, longest: int) -> Packing:
        count = len(lengths)
        rows = torch.repeat_interleave(torch.arange(count, device=lengths.device), lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        columns = torch.arange(len(rows), device=lengths.device) - starts[rows]
        return cls(rows, columns, lengths, longest)

    @property
    def boundaries(self) -> Tensor:
        """(B + 1,) int32 cumulative lengths, as FlashAttention wants them."""
        return torch.nn.functional.pad(torch.cumsum(self.lengths, 0), (1, 0)).to(torch.int32)


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function for `transformers`: (1, H, T, D) in, (1, T, H, D) out.

    The language model passes `packing`; the vision tower passes `cu_seq_lens_q` (boundaries of the pictures).
    """
    assert attention_mask is None, "packed sequences carry no mask"
    scaling, dropout = options.get("scaling"), options.get("dropout", 0.0)
    packing: Packing | None = options.get("packing")
    if packing is not None:
        return _causal(module, query, key, value, packing, scaling, dropout), None
    return _pictures(module, query, key, value, options["cu_seq_lens_q"], scaling, dropout), None


def _sdpa(module: Any, parts: list[Tensor], causal: bool, scaling: float | None, dropout: float) -> Tensor:
    """(B, H, L, D) in, (B, L, H, D) out, by upstream's wrapper (it repeats keys of grouped heads)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *parts, None, dropout=dropout, scaling=scaling, is_causal=causal)[0]


def _causal(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, dropout: float
) -> Tensor:
    rows, columns = packing.rows, packing.columns

    def spread(packed: Tensor) -> Tensor:
        _, heads, _, width = packed.shape
        padded = packed.new_zeros(len(packing.lengths), packing.longest, heads, width)
        padded[rows, columns] = packed[0].transpose(0, 1)
        return padded.transpose(1, 2)

    result = _sdpa(module, [spread(query), spread(key), spread(value)], True, scaling, dropout)
    return result[rows, columns][None]


def _pictures(
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


def use_packed_attention(core: Any) -> None:
    """Make both towers of a loaded Qwen2-VL run `packed_attention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    core.visual.config._attn_implementation = NAME
    core.language_model.config._attn_implementation = NAME
