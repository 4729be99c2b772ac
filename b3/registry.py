"""Names of what can be added: backbones, miners, losses and benchmarks, each `module:object`, imported when used.

Adding one is a file in its folder and a line here; a program of its own may add its line at run time. Nothing heavy is
imported, so that a recipe can be checked without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from b3.errors import InputError

BACKBONES = {  # model_type of config.json
    "qwen2_vl": "b3.model.backbones.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "b3.model.backbones.qwen2_5_vl:Qwen2_5VL",
    "qwen3_vl": "b3.model.backbones.qwen3_vl:Qwen3VL",
    "qwen3_5": "b3.model.backbones.qwen3_5:Qwen3_5",
    "internvl": "b3.model.backbones.internvl:InternVL",
    "bert": "b3.model.backbones.text_encoder:TextEncoder",
    "roberta": "b3.model.backbones.text_encoder:TextEncoder",
    "xlm-roberta": "b3.model.backbones.text_encoder:TextEncoder",
    "b3_heads": "b3.model.backbones.heads:Heads",
}
MINERS = {  # mining.partitioner
    "anneal": "b3.mining.miners.anneal:cut",
    "kmeans": "b3.mining.miners.kmeans:cut",
    "paper": "b3.mining.miners.paper:cut",
    "random": "b3.mining.miners.random:cut",
}
LOSSES = {  # train.loss
    "info_nce": "b3.train.losses.info_nce:InfoNCE",
}
BENCHMARKS = {  # --benchmark of eval_mmeb.py
    "mmeb": "b3.eval.benchmarks.mmeb:MMEB",
    "mmeb_v2": "b3.eval.benchmarks.mmeb_v2.benchmark:MMEB_V2",
    "emoji_v2": "b3.eval.benchmarks.emoji_v2:EMOJI_V2",
    "emoji": "b3.eval.benchmarks.emoji:EMOJI",
}

KINDS = {"backbone": BACKBONES, "miner": MINERS, "loss": LOSSES, "benchmark": BENCHMARKS}


def check(kind: str, name: str) -> str:
    """`name` itself, if an entry of that kind has it. Raises `InputError` listing those there are."""
    if name not in KINDS[kind]:
        raise InputError(f"there is no {kind} '{name}'; choose from {', '.join(sorted(KINDS[kind]))}")
    return name


def load(kind: str, name: str) -> Any:
    """The object of an entry: `load("miner", "anneal")`. Raises `InputError` as `check`."""
    module, _, attribute = KINDS[kind][check(kind, name)].partition(":")
    return getattr(importlib.import_module(module), attribute)
