"""Attention over packed sequences, which lie end to end in one row of T tokens: no padding outside the attention.

varlen: torch's `varlen_attn` takes the row as it is, with the sequences' boundaries: FlashAttention 2, or 3 where a
Hopper card and its package are there. It computes in 16 bit and has no dropout.

sdpa: for everything else. Queries, keys and values of similarly long sequences are laid out as rows padded on the
right: where attention is causal that needs no mask, in a text encoder the padded keys are masked. The vision tower's
images, which attend in both directions and come in few sizes, are grouped by equal size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3.errors import InputError

# transformers hands sequence boundaries to the vision tower's attention only under a name that says flash.
NAMES = {"sdpa": "b3_packed_flash", "varlen": "b3_varlen_flash"}
LEAST_CAPABILITY = (8, 0)  # of a card that FlashAttention 2 runs on
HOPPER = (9, 0)  # what FlashAttention 3 is written for

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


@dataclass(frozen=True)
class Packing:
    """Where packed sequences begin and end.

    lengths: (B,) int64 on the host. columns: (T,) int64, each token's place in its own sequence. boundaries: (B + 1,)
    int32 cumulative lengths. causal: whether a token sees only those before it.
    """

    lengths: np.ndarray
    columns: Tensor
    boundaries: Tensor
    causal: bool

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, causal: bool = True) -> Packing:
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        columns = torch.from_numpy(np.arange(starts[-1]) - np.repeat(starts[:-1], sizes))
        return cls(sizes, columns.to(device), torch.from_numpy(starts.astype(np.int32)).to(device), causal)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Every sequence in exactly one; made when an attention first asks."""
        sizes, device = self.lengths, self.columns.device
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
            if not self.causal and len(tokens) < count * longest:
                real = np.arange(longest) < sizes[members, None]
                keys = torch.from_numpy(real).to(device)[:, None, None]
            buckets.append(Bucket(where[0], where[1], where[2], count, longest, keys))
        return buckets


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """As `packed_attention`, by torch's kernel for packed sequences; by `packed_attention` where that cannot run."""
    dtype = _half(query)
    if dtype is None or options.get("dropout", 0.0):
        return packed_attention(module, query, key, value, attention_mask, **options)
    from torch.nn.attention import varlen

    edges, longest = options["cu_seq_lens_q"], int(options["max_length_q"])
    q, k, v = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    window = (-1, 0) if module.is_causal else (-1, -1)
    grouped = query.shape[1] != key.shape[1]  # fewer heads of keys
    mixed: Any = varlen.varlen_attn(
        q, k, v, edges, edges, longest, longest,
        scale=options.get("scaling"), window_size=window, enable_gqa=grouped,
    )  # fmt: skip
    return mixed[None], None


def _half(query: Tensor) -> torch.dtype | None:
    """The 16-bit type to compute in: autocast's, or the input's; None: neither is one."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


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


def choose_attention(name: str, device: torch.device) -> str:
    """'varlen' or 'sdpa'; 'auto' takes varlen where card and torch have it, FlashAttention 3 where that is installed.

    Raises `InputError` for another name, or for varlen where it cannot run.
    """
    if name not in ("auto", *NAMES):
        raise InputError(f"attention '{name}' is not known; use one of auto, {', '.join(NAMES)}")
    fits = device.type == "cuda" and has_varlen() and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    if name == "varlen" and not fits:
        raise InputError(
            "attention varlen needs a GPU of compute capability 8.0 or newer and torch 2.13; use auto or sdpa"
        )
    if not fits or name == "sdpa":
        return "sdpa"
    if torch.cuda.get_device_capability(device) == HOPPER and find_spec("flash_attn_interface") is not None:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    return "varlen"


def has_varlen() -> bool:
    """Whether torch has the kernel for packed sequences, with grouped heads."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention import varlen

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def use_packed_attention(attention: str, *towers: Any) -> None:
    """Make loaded `transformers` models run the attention that `choose_attention` gave."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = varlen_attention if attention == "varlen" else packed_attention
    ALL_ATTENTION_FUNCTIONS.register(NAMES[attention], function)
    for tower in towers:
        tower.config._attn_implementation = NAMES[attention]


def kernel_name(tower: Any, is_half: bool) -> str:
    """What computes the attention of a loaded model in training, for people; is_half: in 16 bit, also by autocast."""
    if tower.config._attn_implementation != NAMES["varlen"]:
        return "sdpa (rows of similarly long sequences)"
    if not is_half or getattr(tower.config, "attention_probs_dropout_prob", False):
        reason = "attention dropout" if is_half else "float32"
        return f"sdpa (rows of similarly long sequences; varlen has no {reason})"
    from torch.nn.attention import current_flash_attention_impl

    return f"varlen (torch's varlen_attn, {current_flash_attention_impl() or 'FA2'})"


def kernel_arguments(packing: Packing) -> dict[str, Any]:
    """What tells a model's attention function where items begin and end."""
    edges, longest = packing.boundaries, packing.longest
    return {
        "packing": packing,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }
