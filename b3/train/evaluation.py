"""Evaluation on the way: the weights as they are, on the subsets and with the prompts of the final evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from b3.config import Config
from b3.data.datasets import EvalDataset, load_eval
from b3.eval.run import EvalSpec, evaluate_subset
from b3.model.encode import Encoder

if TYPE_CHECKING:
    from b3.model.embedder import Embedder


class Evaluator:
    """Scores the recipe's `eval` section; ranks share the encoding, every rank gets the scores.

    Differs from `eval_mmeb.py` in rounding only: the adapter is not merged, and the backbone runs in the precision of
    training. Takes nothing from the random state of training.

    Raises:
        DataError: the evaluation data cannot be read; when built, so before the first step.
    """

    def __init__(self, config: Config, embedder: Embedder) -> None:
        assert config.eval is not None
        self.embedder = embedder
        self.autocast = config.train.bf16
        self.workers = config.train.workers
        settings = config.eval
        self.spec = EvalSpec(config.model.name, settings.source)
        self.datasets: list[EvalDataset] = [
            load_eval(
                settings.source,
                name,
                settings.split,
                image_dir=settings.image_dir,
                prefix_targets=settings.prefix_targets,
                max_rows=settings.max_rows,
            )
            for name in settings.subsets
        ]

    def __call__(self) -> dict[str, float]:
        """Precision@1 by subset, and their `mean`. A collective call."""
        device = self.embedder.device.type
        encoder = Encoder(self.embedder, workers=self.workers)
        devices = [self.embedder.device] if device == "cuda" else []
        with torch.random.fork_rng(devices), torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            scores = {d.name: float(evaluate_subset(d, encoder, self.spec).precision) for d in self.datasets}
        return {**scores, "mean": sum(scores.values()) / len(scores)}
