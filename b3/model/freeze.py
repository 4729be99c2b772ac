"""Which parameters are trained: the adapter's or all, less those that a recipe freezes by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from b3.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def unfreeze_all(backbone: nn.Module) -> None:
    """Make every parameter that reaches the vectors trainable, in float32 (the optimiser's steps vanish in 16 bit).

    A language head of its own weights stays frozen: it is never run. Tied to the embedding, it is trained as that.
    """
    core: Any = backbone
    embedding = core.get_input_embeddings().weight
    backbone.float()
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    head = getattr(core, "lm_head", None)
    if head is not None and head.weight is not embedding:
        head.weight.requires_grad_(False)


def freeze_matching(backbone: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze trainable parameters whose name a regular expression finds; returns their names.

    Names are those of `named_parameters`, such as ``model.visual.merger.mlp.0.weight``; an adapter puts
    ``base_model.model.`` before them.

    Raises:
        InputError: a pattern is no regular expression or finds nothing, or nothing is left to train.
    """
    named = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    frozen: dict[str, None] = {}
    for pattern in patterns:
        try:
            found = [name for name in named if re.search(pattern, name)]
        except re.error as error:
            raise InputError(f"model.freeze '{pattern}' is not a regular expression: {error}") from None
        if not found:
            some = ", ".join(list(named)[:: max(1, len(named) // 3)][:3])
            raise InputError(
                f"model.freeze '{pattern}' matches none of the {len(named)} trained parameters (e.g. {some})"
            )
        frozen.update(dict.fromkeys(found))
    if len(frozen) == len(named):
        raise InputError(f"model.freeze {list(patterns)} leaves none of the {len(named)} parameters to train")
    for name in frozen:
        named[name].requires_grad_(False)
    return list(frozen)
