"""The last decoder layer, without what nobody reads.

The vector is the last token's final hidden state. In the last layer the other tokens are only keys and values to it:
the MLP, most of a layer, runs for the last tokens alone. Vectors and gradients stay what they are, up to rounding.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor


def keep_last_tokens(model: Any) -> None:
    """Make the last layer of a loaded model's text model return (1, B, D), the last tokens of the B packed items.

    One of linear attention stays as it is, and so does one to whose output DeepStack adds.
    """
    layers = model.language_model.layers
    stacked = getattr(model.config.vision_config, "deepstack_visual_indexes", ())
    if hasattr(layers[-1], "self_attn") and len(stacked) < len(layers):
        layers[-1].forward = types.MethodType(_forward, layers[-1])
        layers[-1].keeps_last_tokens = True


def keeps_last_tokens(language: Any) -> bool:
    """Whether `keep_last_tokens` changed this text model."""
    return getattr(language.layers[-1], "keeps_last_tokens", False)


def _forward(self: Any, hidden_states: Tensor, *, cu_seq_lens_q: Tensor, **arguments: Any) -> Tensor:
    """Upstream's forward pass; between attention and MLP all but the tokens before the (B + 1,) boundaries go."""
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), cu_seq_lens_q=cu_seq_lens_q, **arguments
    )
    last = (hidden_states + attended).index_select(1, cu_seq_lens_q[1:] - 1)
    passed: Tensor = last + self.mlp(self.post_attention_layernorm(last))
    return passed
