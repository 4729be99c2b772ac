"""Floating-point operations of a step, counted from what its chunks hold, and the share of the device's peak they use.

A linear layer with N weights costs 2N operations a token forwards, 2N for the gradient of its input and 2N for the
gradient of its weights. Attention of a sequence of L tokens in a layer of width d costs 4 L^2 d forwards, half of it
when causal, and twice as much backwards. The token embedding, norms and element-wise parts are left out. So, summed
over a step (N: all linear weights that a token passes, N_t: those of them that are trained):

    language model   4 N L + 2 N_t L + 3 attention     gradients pass through it whatever is trained
    text encoder     4 N L + 2 N_t L + 3 attention     not causal
    vision tower     the same if anything in it is trained, else 2 N P + attention     P patches

A frozen tower sees each distinct picture of a rank once, a trained one each distinct picture of a chunk.

Every item counts once: the first pass of the cached step is a recomputation, and as usual (PaLM, appendix B) model
FLOP utilisation leaves recomputation out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from b3.model.embedder import Cost, Tower
    from b3.train.inputs import StepInputs

# Dense bfloat16 peak, FLOP/s, by a part of the name that CUDA reports; first match (manufacturers' data sheets).
PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("H800", 989e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12),
)


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by its name, None if it is not in the table."""
    return next((peak for part, peak in PEAKS if part in device_name), None)


def tower_flops(tower: Tower, tokens: int, squares: int, backward: bool) -> float:
    """Operations for `tokens` tokens whose sequence lengths squared add up to `squares`."""
    passes = 3 if backward else 1
    linear = (4 if backward else 2) * tower.weights * tokens + 2 * tower.trained * tokens
    return float(linear + passes * (2 if tower.causal else 4) * squares * tower.attention)


def step_flops(cost: Cost, inputs: StepInputs) -> float:
    """Operations of one rank's share of a step, forward and backward."""
    lengths = inputs.lengths
    total = tower_flops(cost.text, sum(lengths), sum(n * n for n in lengths), backward=True)
    if inputs.images is not None:
        assert cost.vision is not None
        sizes, trained = inputs.images.sizes, cost.vision.trained > 0
        groups = [[inputs.image_of[i] for i in group] for group in inputs.groups] if trained else [range(len(sizes))]
        patches = [sizes[number] for group in groups for number in set(group) if number >= 0]
        total += tower_flops(cost.vision, sum(patches), sum(n * n for n in patches), backward=trained)
    return total
