"""AdamW, which parameters decay, and the learning rate by step."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

# The groups of `transformers.Trainer`: norms and biases do not decay.
_SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
LOSS = "loss."  # prefix of a loss's parameters


def trained_parameters(embedder: nn.Module, loss: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with a gradient, by name, a shared one once."""
    parameters = [*embedder.named_parameters(), *((LOSS + name, p) for name, p in loss.named_parameters())]
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def build_optimizer(
    parameters: dict[str, nn.Parameter], embedder: nn.Module, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW in two groups: biases, norms and the parameters of the loss do not decay."""
    in_norms = {id(p) for m in embedder.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}

    def decays(name: str) -> bool:
        spared = name.startswith(LOSS) or _SPARED.search(name.lower()) or id(parameters[name]) in in_norms
        return not spared

    groups = [
        {"params": [p for name, p in parameters.items() if decays(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, steps: int) -> Any:
    """Linear warm-up from 0, then linear or cosine to 0, or constant."""
    from transformers import get_scheduler

    kind = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)


def schedule_at(schedule: Any, step: int) -> None:
    """Set the learning rate to that of a step: it is a function of the step alone."""
    schedule.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "step() before optimizer.step()"
        schedule.step()
