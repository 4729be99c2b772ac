"""What a run tells while it goes on: a line of metrics.jsonl now and then, the bar, the trackers.

Floating-point operations of a step, counted from what its chunks hold, and the share of the device's peak they use.

A linear layer with N weights costs 2N operations per token forwards, 2N for the gradient of its input and 2N for the
gradient of its weights. Attention of a sequence of L tokens in a layer of width d costs 4 L^2 d forwards, half of it
when causal, and twice as much backwards. The token embedding, norms and element-wise parts are left out. So, summed
over a step (N: all linear weights that a token passes, N_t: those of them that are trained):

    language model   4 N L + 2 N_t L + 3 attention     gradients pass through it whatever is trained
    text encoder     4 N L + 2 N_t L + 3 attention     not causal
    vision tower     the same if anything in it is trained, else 2 N P + attention     P patches

A frozen tower sees each distinct image of a rank once, a trained one each distinct image of a chunk.

Every item counts once: the first pass of the cached step is a recomputation, and as usual (PaLM, appendix B) model
FLOP utilisation leaves recomputation out.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from b3 import distributed
from b3.console import bar, duration, peak_memory
from b3.files import flat
from b3.train.step import StepResult

if TYPE_CHECKING:
    from b3.config import Config
    from b3.model.embedder import Cost, Embedder, Tower
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
    """Operations for `tokens` tokens whose sequence lengths squared add up to `squares`.

    What only last tokens pass is left out.
    """
    passes = 3 if backward else 1
    weights, trained = tower.weights - tower.pooled[0], tower.trained - tower.pooled[1]
    linear = (4 if backward else 2) * weights * tokens + 2 * trained * tokens
    return float(linear + passes * (2 if tower.causal else 4) * squares * tower.attention)


def step_flops(cost: Cost, inputs: StepInputs) -> float:
    """Operations of one rank's share of a step, forward and backward."""
    lengths = inputs.lengths
    total = tower_flops(cost.text, sum(lengths), sum(n * n for n in lengths), backward=True)
    if inputs.images is not None:
        assert cost.vision is not None
        trained = cost.vision.trained > 0
        groups = inputs.groups if trained else [np.arange(inputs.num_items)]  # frozen: each image once a step
        shown = [number for group in groups for number in {n for i in group for n in inputs.images_of[i]}]
        grids = inputs.images.grids[shown]
        patches, squares = grids.prod(axis=1), grids[:, 0] * grids[:, 1:].prod(axis=1) ** 2  # a step sees itself
        total += tower_flops(cost.vision, int(patches.sum()), int(squares.sum()), backward=trained)
    return total


class Window:
    """Sums between two lines of the log.

    The results of the steps travel with a checkpoint, so that a resumed run writes the lines of an uninterrupted one.
    """

    def __init__(self, embedder: Embedder, low_precision: bool) -> None:
        self.embedder = embedder
        self.cost = embedder.cost()
        cuda = embedder.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(embedder.device)) if cuda and low_precision else None
        self.results: list[StepResult] = []
        self.clear()

    def clear(self) -> None:
        self.clear_times()
        self.results = []

    def clear_times(self) -> None:
        self.started = time.perf_counter()
        self.waited = self.flops = 0.0
        self.tokens = self.timed = 0

    def add(self, result: StepResult, inputs: StepInputs) -> None:
        self.results.append(result)
        self.timed += 1
        self.tokens += inputs.num_tokens
        self.flops += step_flops(self.cost, inputs)

    def state(self) -> list[dict[str, Any]]:
        return [asdict(result) for result in self.results]

    def restore(self, state: list[dict[str, Any]]) -> None:
        self.results = [StepResult(**result) for result in state]

    def summary(self, batch_size: int) -> dict[str, float | None]:
        """Means, and speeds over all ranks: a collective call."""
        seconds, count = time.perf_counter() - self.started, len(self.results)
        memory = peak_memory(self.embedder.device)
        ranks = distributed.numbers_of_ranks([self.tokens, self.flops, self.waited, memory])
        tokens, flops = (sum(part[i] for part in ranks) for i in (0, 1))
        waited, most = (max(part[i] for part in ranks) for i in (2, 3))
        return {
            "loss": sum(r.loss for r in self.results) / count,
            "in_batch_precision": sum(r.precision for r in self.results) / count,
            "positive_similarity": sum(r.positive for r in self.results) / count,
            "hardest_negative_similarity": sum(r.hardest_negative for r in self.results) / count,
            "masked_columns": sum(r.masked for r in self.results) / count,
            "pairs_per_second": batch_size * self.timed / seconds,
            "tokens_per_second": tokens / seconds,
            "waiting_for_data": waited / seconds,
            "peak_memory_bytes": int(most),
            "tflops_per_rank": flops / len(ranks) / seconds / 1e12,
            "mfu": None if self.peak is None else flops / len(ranks) / seconds / self.peak,
        }


TIMED_STEPS = 5


class ProgressBar:
    """A bar with the last loss, and after five steps the time that is left."""

    def __init__(self, start: int, steps: int, visible: bool) -> None:
        self.start, self.steps, self.visible = start, steps, visible
        self.after_first = 0.0
        self.bar = bar(steps, "train" if visible else None, "step", initial=start, leave=True)

    def update(self, step: int) -> None:
        """A step is over; `step` of them since the beginning of training."""
        self.bar.update(1)
        timed = step - self.start
        if timed == 1:  # the first step warms up
            self.after_first = time.perf_counter()
        if timed == TIMED_STEPS and self.visible and step < self.steps:
            each = (time.perf_counter() - self.after_first) / (TIMED_STEPS - 1)
            self.bar.write(f"  about {duration(each * (self.steps - step))} to go ({duration(each)} per step)")

    def show(self, summary: dict[str, float | None]) -> None:
        """Put numbers of the last line of the log behind the bar."""
        loss, precision, speed = (summary[k] for k in ("loss", "in_batch_precision", "pairs_per_second"))
        self.bar.set_postfix_str(f"loss={loss:.3f}, p@1={precision:.2f}, pairs/s={speed:.0f}", refresh=False)

    def note(self, text: str) -> None:
        """Put a line above the bar."""
        self.bar.write(f"  {text}")

    def close(self) -> None:
        self.bar.close()


class Trackers:
    """The numbers of metrics.jsonl for other programs (`train.trackers`), through `accelerate`'s one interface to them.

    Args:
        config: the recipe, which goes along as the run's parameters; None: reports nothing.
    """

    def __init__(self, config: Config | None) -> None:
        self.trackers: list[Any] = []
        if config is None or not config.train.trackers:
            return
        from accelerate import Accelerator

        folder = f"{config.output_dir}/runs"
        accelerator = Accelerator(
            log_with=list(config.train.trackers), project_dir=folder, cpu=not torch.cuda.is_available()
        )
        keys = flat(config.model_dump(mode="json")).items()
        parameters = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in keys}
        accelerator.init_trackers(config.name, config=parameters)
        self.trackers = accelerator.trackers

    def log(self, group: str, values: dict[str, Any], step: int) -> None:
        """Report the numbers among `values` as group/name."""
        numbers = {f"{group}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        for tracker in self.trackers:  # `Accelerator.end_training` would take our process group down as well
            tracker.finish()
