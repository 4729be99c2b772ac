"""The six subsets of the embedded emoji data, one or more of each family."""

from __future__ import annotations

from b3.eval.benchmark import Benchmark, Task

_SUBSETS = {
    "Classification": "emoji_cls",
    "VQA": "emoji_vqa",
    "Retrieval": "emoji_t2i emoji_i2t emoji_i2i",
    "Visual grounding": "emoji_vg",
}

EMOJI = Benchmark(
    "emoji",
    tuple(Task(name, family) for family, names in _SUBSETS.items() for name in names.split()),
    "embedded:emoji",
)
