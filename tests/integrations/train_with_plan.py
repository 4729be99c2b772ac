"""Train with sentence-transformers' trainer on the batches of a plan; write the rows that each rank's model saw.

On several ranks: forks.Job(..., OUT, ROWS, PER_RANK, K, program="integrations.train_with_plan:on_a_rank").
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from b3 import Embedder
from b3.distributed import rank
from b3.integrations.sentence_transformers import BatchPlanSampler
from b3.mining.plan import BatchPlan


def plan(num_rows: int, size: int, seed: int = 0) -> BatchPlan:
    rows = np.random.default_rng(seed).permutation(num_rows)
    cut = num_rows // size * size
    return BatchPlan(rows[:cut].reshape(-1, size), rows[cut:])


class Watched(CachedMultipleNegativesRankingLoss):
    out: Path

    def forward(self, sentence_features, labels=None):  # type: ignore[no-untyped-def]
        columns = list(sentence_features)
        texts = self.model_of().tokenizer.batch_decode(columns[0]["input_ids"], skip_special_tokens=True)
        with (self.out / f"rank-{rank()}.jsonl").open("a") as file:
            file.write(json.dumps([int(text.split()[-1]) for text in texts]) + "\n")
        return super().forward(columns, labels)

    def model_of(self) -> SentenceTransformer:
        return getattr(self.model, "module", self.model)


def main(out: Path, rows: int, per_rank: int, size: int) -> None:
    folder = out / f"model-{rank()}"
    Embedder.from_pretrained(tiny.write_text_model(folder / "base"), dtype="float32").save(folder / "saved")
    model = SentenceTransformer(str(folder / "saved"), device="cpu")
    texts = [f"a red disc {row}" for row in range(rows)]
    data = Dataset.from_dict({"anchor": texts, "positive": [f"number {row}" for row in range(rows)]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out / "run"), num_train_epochs=2, per_device_train_batch_size=per_rank, seed=3, use_cpu=True,
        batch_sampler=BatchPlanSampler.of(plan(rows, size), plan_seed=7), report_to="none", save_strategy="no",
    )  # fmt: skip
    loss = Watched(model, mini_batch_size=4, gather_across_devices=True)
    loss.out = out
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()


def on_a_rank(arguments: list[str]) -> int:
    main(Path(arguments[0]), *map(int, arguments[1:]))
    return 0
