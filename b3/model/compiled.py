"""Layers compiled one by one, so that what lies between matrix products and attention runs as few kernels.

A layer is compiled once and shared by all of its kind, for any number of tokens. Weights, names and results stay what
they are, up to rounding.
"""

from __future__ import annotations

from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import nn

from b3.errors import InputError

COMPILERS = ("cc", "gcc", "clang", "g++", "c++")
VARIANTS = 64  # of one layer: kind, train or eval, with a graph or without


def compile_layers(layers: list[nn.Module], choice: bool | str, device: torch.device) -> str:
    """Compile layers in place; says what runs them, for people.

    Args:
        layers: of any number of kinds.
        choice: "auto" compiles on a GPU if this installation can; True also on a CPU; False does not.
        device: of the layers.

    Raises:
        InputError: choice is True, and this installation cannot.
    """
    if not layers or choice is False:
        return "eager"
    if choice == "auto" and device.type != "cuda":
        return "eager (compiled on a GPU)"
    problem = why_not(device)
    if problem is not None:
        if choice is True:
            raise InputError(f"model.compile true: {problem}; set it to auto or false")
        return f"eager ({problem})"
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS)
    for layer in layers:
        layer.compile(dynamic=True)
    return f"compiled (inductor, {len(layers)} layers)"


def why_not(device: torch.device) -> str | None:
    """What this installation lacks for compiling, or None. Tries it on a small function."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(which, COMPILERS)):
        return "no C compiler was found"
    try:
        torch.compile(_probe)(torch.zeros(16, device=device))
    except Exception as error:  # inductor, triton, the compiler and the driver each raise their own
        return f"compiling does not work here: {str(error).strip().splitlines()[0][:200]}"
    return None


def _probe(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.sin() + numbers
