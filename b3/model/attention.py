"""Attention over packed sequences, which lie end to end in one row of T tokens: no padding outside the attention.

varlen: torch's `varlen_attn` takes the row as it is, with the sequences' boundaries: FlashAttention 2, or 3 where a
Hopper card and its package are there. It computes in 16 bit and has no dropout.

sdpa: for everything else. Queries, keys and values of similarly long sequences are laid out as rows padded on the
right: where attention is causal that needs no mask, in a text encoder the padded keys are masked. The vision tower's
images, which attend in both directions and come in few sizes, are grouped by equal size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b3.errors import InputError
from b3.model.batch import upload

# transformers hands sequence boundaries to the vision tower's attention only under a name that says flash.
NAMES = {"sdpa": "b3_packed_flash", "varlen": "b3_varlen_flash"}
LEAST_CAPABILITY = (8, 0)  # of a card that FlashAttention 2 runs on
HOPPER = (9, 0)  # what FlashAttention 3 is written for

BUCKET = 1.25  # sequences whose lengths differ by a smaller factor share one padded call


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length.

    tokens: (t,) int64, their places among the packed tokens. places: (t,) int64, their places in a table of
    count x longest, row by row; None: they fill it. keys: (count, 1, 1, longest) bool, True for tokens and False for
    padding; None: attention is causal, or nothing is padded.
    """

    tokens: Tensor
    places: Tensor | None
    count: int
    longest: int
    keys: Tensor | None = None


@dataclass(frozen=True)
class Packing:
    """Where packed sequences begin and end. Made on the host; `b3.model.batch.upload` takes it to a device.

    lengths: (B,) int64, stays on the host. columns: (T,) int64, each token's place in its own sequence. boundaries:
    (B + 1,) int32 cumulative lengths. causal: whether a token sees only those before it. equal: whether only equally
    long sequences share a bucket. known_buckets: made together with the rest, or None.
    """

    lengths: np.ndarray
    columns: Tensor
    boundaries: Tensor
    causal: bool
    equal: bool
    known_buckets: list[Bucket] | None

    @classmethod
    def of(
        cls, lengths: Sequence[int] | np.ndarray, causal: bool = True, equal: bool = False, is_bucketed: bool = True
    ) -> Packing:
        """Of sequences of these lengths. is_bucketed: the attention reads buckets."""
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        columns = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        buckets = _buckets(sizes, columns, causal, equal) if is_bucketed else None
        return cls(sizes, torch.from_numpy(columns), torch.from_numpy(starts.astype(np.int32)), causal, equal, buckets)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Every sequence in exactly one; made here if an attention that does without them could not run."""
        if self.known_buckets is not None:
            return self.known_buckets
        return upload(Packing.of(self.lengths, self.causal, self.equal).buckets, self.columns.device)


def _buckets(sizes: np.ndarray, columns: np.ndarray, causal: bool, equal: bool) -> list[Bucket]:
    """Sequences by length."""
    rows = np.repeat(np.arange(len(sizes)), sizes)
    kinds = sizes if equal else np.floor(np.log(sizes) / np.log(BUCKET)).astype(np.int64)
    buckets = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        place = np.full(len(sizes), -1)
        place[members] = np.arange(len(members))
        tokens = np.flatnonzero(place[rows] >= 0)
        count, longest, places, keys = len(members), int(sizes[members].max()), None, None
        if len(tokens) < count * longest:
            places = torch.from_numpy(place[rows[tokens]] * longest + columns[tokens])
            if not causal:
                keys = torch.from_numpy(np.arange(longest) < sizes[members, None])[:, None, None]
        buckets.append(Bucket(torch.from_numpy(tokens), places, count, longest, keys))
    return buckets


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    otherwise: Callable[..., tuple[Tensor, None]] | None = None,
    says_groups: bool = True,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `packed_attention`, by torch's kernel for packed sequences; by `otherwise` where that cannot run.

    otherwise: `packed_attention` unless given. says_groups: whether the kernel is told that keys have fewer heads;
    before torch 2.12 it sees that by itself.
    """
    dtype = _half(query)
    if dtype is None or options.get("dropout", 0.0):
        return (otherwise or packed_attention)(module, query, key, value, attention_mask, **options)
    from torch.nn.attention import varlen

    edges, longest = options["cu_seq_lens_q"], int(options["max_length_q"])
    q, k, v = (part.squeeze(0).transpose(0, 1).to(dtype) for part in (query, key, value))
    window = (-1, 0) if module.is_causal else (-1, -1)
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if says_groups else {}
    mixed: Any = varlen.varlen_attn(
        q, k, v, edges, edges, longest, longest, scale=options.get("scaling"), window_size=window, **grouped
    )
    return mixed[None], None


def _half(query: Tensor) -> torch.dtype | None:
    """The 16-bit type to compute in: autocast's, or the input's; None: neither is one."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function for `transformers`: (1, H, T, D) in, (1, T, H, D) out; `packing` is among the options.

    Two ways to cut a sequence that have equally many boundaries are the same, where one refines the other.
    """
    assert attention_mask is None, "packed sequences carry no mask"
    packing: Packing | dict[int, Packing] = options["packing"]
    if isinstance(packing, dict):  # a tower whose layers cut the sequences in several ways: by number of boundaries
        packing = packing[len(options["cu_seq_lens_q"])]
    scaling, dropout = options.get("scaling"), options.get("dropout", 0.0)
    pieces = []
    for bucket in packing.buckets:
        parts = [spread(part, bucket) for part in (query, key, value)]
        pieces.append(_sdpa(module, parts, module.is_causal, scaling, dropout, bucket.keys))
    return packed(pieces, packing.buckets), None


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


def spread(row: Tensor, bucket: Bucket) -> Tensor:
    """(1, H, T, D) packed to (count, H, longest, D), padded on the right."""
    _, heads, _, width = row.shape
    tokens = row.squeeze(0).transpose(0, 1).index_select(0, bucket.tokens)
    if bucket.places is not None:
        table = row.new_zeros(bucket.count * bucket.longest, heads, width)
        tokens = table.index_copy(0, bucket.places, tokens)
    return tokens.view(bucket.count, bucket.longest, heads, width).transpose(1, 2)


def packed(tables: Sequence[Tensor], buckets: Sequence[Bucket]) -> Tensor:
    """(1, T, ...) packed of a table (count, longest, ...) for each bucket, without its padding."""
    pieces = []
    for table, bucket in zip(tables, buckets, strict=True):
        tokens = table.flatten(0, 1)
        pieces.append(tokens if bucket.places is None else tokens.index_select(0, bucket.places))
    if len(pieces) == 1:
        return pieces[0][None]
    order, joined = torch.cat([bucket.tokens for bucket in buckets]), torch.cat(pieces)
    return torch.empty_like(joined).index_copy(0, order, joined)[None]


def choose_attention(name: str, device: torch.device) -> str:
    """'varlen' or 'sdpa'; 'auto' takes varlen where card and torch have it, FlashAttention 3 where that is installed.

    Raises `InputError` for another name, or for varlen where it cannot run.
    """
    if name not in ("auto", *NAMES):
        raise InputError(f"attention '{name}' is not known; use one of auto, {', '.join(NAMES)}")
    fits = device.type == "cuda" and has_varlen() and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    if name == "varlen" and not fits:
        raise InputError(
            "attention varlen needs a GPU of compute capability 8.0 or newer and torch 2.11; use auto or sdpa"
        )
    if not fits or name == "sdpa":
        return "sdpa"
    if torch.cuda.get_device_capability(device) == HOPPER and find_spec("flash_attn_interface") is not None:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    return "varlen"


def varlen_options() -> set[str]:
    """Names of the kernel's parameters; none where torch has no such kernel."""
    if find_spec("torch.nn.attention.varlen") is None:
        return set()
    from torch.nn.attention import varlen  # here, since it brings the compiler: a second of every start

    return set(inspect.signature(varlen.varlen_attn).parameters)


def has_varlen() -> bool:
    """Whether torch has the kernel for packed sequences, with the options that are asked of it."""
    return {"scale", "window_size"} <= varlen_options()


def use_packed_attention(attention: str, *towers: Any) -> None:
    """Make loaded `transformers` models run the attention that `choose_attention` gave."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: Callable[..., Any] = torch.compiler.disable(packed_attention)  # compiled layers call it as it is
    if attention == "varlen":
        function = partial(varlen_attention, otherwise=function, says_groups="enable_gqa" in varlen_options())
    ALL_ATTENTION_FUNCTIONS.register(NAMES[attention], function)
    for tower in towers:
        tower.config._attn_implementation = NAMES[attention]


def is_bucketed(tower: Any) -> bool:
    """Whether the attention of a loaded model reads buckets; else it reads the boundaries."""
    bucketed: bool = tower.config._attn_implementation != NAMES["varlen"]
    return bucketed


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
