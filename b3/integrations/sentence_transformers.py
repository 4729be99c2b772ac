"""Our models in sentence-transformers, and our batches in its trainer.

A text encoder that we save is one of theirs: ``SentenceTransformer(folder)`` needs nothing of b3. What a
vision-language model reads (raw prompts, 1-D positions, images resized as its training did) is beyond their own module,
so its folder names `EmbedderModule` of the installed b3. The folder holds no code:

    model = load("runs/b3/merged")                                            # or
    model = SentenceTransformer("runs/b3/merged", trust_remote_code=True)     # consent to import b3
    vectors = model.encode(["a cat", {"image": "cat.jpg", "text": "Represent the given image."}])

Batches of a plan, for any of their losses:

    arguments = SentenceTransformerTrainingArguments(..., batch_sampler=BatchPlanSampler.of(plan))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from b3.errors import InputError
from b3.integrations.items import as_read
from b3.model.batch import Batch, Processed, collate
from b3.model.checkpoint import fetch
from b3.model.embedder import Embedder
from b3.train.sampler import BatchPlanSampler as PlanSampler

IMAGE_KINDS: list[Any] = ["text", "image", ("image", "text"), "message"]


def load(name: str | Path, device: str | None = None, **settings: Any) -> SentenceTransformer:
    """A checkpoint of ours as a `SentenceTransformer`; `settings` as those of `Embedder.from_pretrained`.

    Raises `InputError` as that does.
    """
    embedder = Embedder.from_pretrained(name, device=device, **{"dtype": "auto", **settings})
    return SentenceTransformer(modules=[EmbedderModule(embedder), Normalize()], device=device)


class EmbedderModule(InputModule):
    """An `Embedder` as the first module of a `SentenceTransformer`: inputs to vectors that are not normalised yet.

    Inputs and prompts are read by `b3.integrations.items.as_read`. All parameters are trainable, and batches can be
    cut, hence cached losses work.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder.requires_grad_(True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> EmbedderModule:
        """From a folder or a hub name; `model_kwargs` may hold `dtype`."""
        folder = fetch(model_name_or_path, options.get("revision")) / subfolder
        given = options.get("model_kwargs") or {}
        dtype = given.get("dtype", given.get("torch_dtype")) or "auto"
        return cls(Embedder.from_pretrained(folder, dtype=str(dtype).removeprefix("torch.")))

    def save(self, output_path: str, *arguments: Any, **options: Any) -> None:
        self.embedder.save(Path(output_path))

    @property
    def modalities(self) -> list[Any]:
        return IMAGE_KINDS if self.embedder.reads_images else ["text"]

    @property
    def tokenizer(self) -> Any:
        processor: Any = self.embedder.processor
        return processor.tokenizer

    def get_embedding_dimension(self) -> int:
        return self.embedder.dim

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of the longest text."""
        return self.embedder.settings.max_length

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Features of (B, L) padded rows, their media end to end. Raises `DataError` as `Embedder.encode`."""
        processor = self.embedder.processor
        return padded([processor(as_read(self.embedder, one, prompt or "")) for one in inputs])

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Add "sentence_embedding" (B, D) float32."""
        features["sentence_embedding"] = self.embedder(packed(features), normalize=False)
        return features


def padded(items: Sequence[Processed]) -> dict[str, Any]:
    """Processed items under the names that sentence-transformers can cut.

    input_ids, attention_mask, is_slot (B, L), positions (B, L, 3) if any item has its own; pixel_values (P, C, n)
    uint8, image_grid_thw (media, 3), num_images_per_sample (B,); a video counts as an image here.
    """
    batch = collate(items)
    parts = batch.input_ids.split(batch.lengths)
    slots = torch.zeros(len(batch.input_ids), dtype=torch.bool)
    features: dict[str, Any] = {
        "input_ids": pad_sequence(list(parts), batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(part) for part in parts], batch_first=True),
    }
    if batch.positions is not None:
        features["positions"] = pad_sequence(list(batch.positions.T.split(batch.lengths)), batch_first=True)
    if batch.patches is not None:
        assert batch.slots is not None and batch.grids is not None
        slots[batch.slots] = True
        features["pixel_values"] = batch.patches
        features["image_grid_thw"] = torch.from_numpy(batch.grids)
        features["num_images_per_sample"] = torch.tensor([len(item.visuals) for item in items])
    features["is_slot"] = pad_sequence(list(slots.split(batch.lengths)), batch_first=True)
    return features


def packed(features: dict[str, Any]) -> Batch:
    """The batch of `padded`, or of the part of it that was cut out."""
    kept = features["attention_mask"].bool()
    slots, patches = torch.nonzero(features["is_slot"][kept])[:, 0], features.get("pixel_values")
    has_media = patches is not None and len(slots) > 0
    positions: Tensor | None = features.get("positions")
    return Batch(
        features["input_ids"][kept],
        kept.sum(dim=1).tolist(),
        patches=patches if has_media else None,
        grids=features["image_grid_thw"].cpu().numpy() if has_media else None,
        slots=slots if has_media else None,
        positions=None if positions is None else positions[kept].T,
    )


class BatchPlanSampler(DefaultBatchSampler):
    """The batches of a plan in `SentenceTransformerTrainer`: `batch_sampler=BatchPlanSampler.of(plan)`.

    A mined batch is what all ranks have together: `per_device_train_batch_size` times the ranks, a multiple of K. It
    comes as one batch per rank, one after the other, which is how the trainer hands batches out. Several ranks share
    negatives only under a loss with `gather_across_devices=True`. Each epoch draws anew, as `b3.train.BatchPlanSampler`
    does. A last batch that would be short is left
    out; its rows come in later epochs.

    Args:
        plans: a `BatchPlan`, or a list of them for `concatenate_datasets` of their rows in that order.
        plan_seed: of the draw; None: what the trainer passes, which is the seed of the training arguments, or 0 in
            sentence-transformers 6.0.
        world_size: number of ranks; None: as torch.distributed says.
        others: what to do with a data set that has not the plan's number of rows, as an `eval_dataset` has not:
            "refuse", or "in_order" for batches of consecutive rows.

    Raises:
        InputError: the rows are not the plan's, or the batch size does not fit K.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        plans: Any,
        plan_seed: int | None = None,
        world_size: int | None = None,
        others: str = "refuse",
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.sampler = self  # accelerate tells the epoch to the sampler of a batch sampler
        several = isinstance(plans, (list, tuple))
        sizes = [plan.communities.size + plan.remainder.size for plan in (plans if several else [plans])]
        self.num_rows = len(dataset)
        self.plan: PlanSampler | None = None
        self.starts = np.cumsum([0, *sizes[:-1]])
        if self.num_rows != sum(sizes):
            if others == "in_order":
                return
            raise InputError(
                f"the data set has {self.num_rows:,} rows, the plan {sum(sizes):,}; give the rows that were mined, and"
                " for an eval_dataset BatchPlanSampler.of(plan, others='in_order')"
            )
        self.world_size = _world_size() if world_size is None else world_size
        self.plan = PlanSampler(
            list(plans) if several else [plans],
            batch_size * self.world_size,
            seed=seed if plan_seed is None else plan_seed,
        )

    @classmethod
    def of(cls, plans: Any, **options: Any) -> Callable[..., BatchPlanSampler]:
        """What the training argument `batch_sampler` takes."""
        return partial(cls, plans=plans, **options)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if self.plan is not None:
            self.plan.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size) if self.plan is None else len(self.plan) * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        if self.plan is None:
            rows = range(self.num_rows)
            yield from (list(rows[s : s + self.batch_size]) for s in range(0, self.num_rows, self.batch_size))
            return
        for pairs in self.plan:
            chosen = [int(self.starts[number]) + row for number, row in pairs]
            for start in range(0, len(chosen), self.batch_size):
                yield chosen[start : start + self.batch_size]


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
