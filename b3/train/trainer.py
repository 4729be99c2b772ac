"""A thin subclass of `transformers.Trainer`: its loop, optimiser, schedule and trackers, our step and batches."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from b3.config import Config
from b3.errors import DataError, InputError, RunError
from b3.model.adapter import load_trainable
from b3.model.embedder import Embedder
from b3.model.weights import load_full, save_full
from b3.progress import bar
from b3.train.checkpoint import METRICS, checkpoint_step, mark_complete
from b3.train.collate import Rows, StepCollator
from b3.train.gradcache import CachedStep, StepResult
from b3.train.inputs import StepInputs
from b3.train.loss import ContrastiveLoss
from b3.train.sampler import BatchPlanSampler


def training_arguments(config: Config, world_size: int) -> TrainingArguments:
    """The part of a recipe that `transformers` takes over."""
    train = config.train
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=train.steps,
        per_device_train_batch_size=config.batch.size // world_size,
        learning_rate=train.lr,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=train.keep_checkpoints,
        seed=config.seed,
        ignore_data_skip=True,  # the sampler starts at the right batch by itself
        remove_unused_columns=False,
        disable_tqdm=True,  # our own bar
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )


class ContrastiveTrainer(Trainer):
    """Trains an `Embedder`'s adapter with the cached contrastive step.

    Args:
        embedder: with a peft-wrapped backbone.
        config: the recipe.
        collator: builds a rank's `StepInputs`.
        sampler: batches of this rank, started at the first step to run.
    """

    def __init__(self, embedder: Embedder, config: Config, collator: StepCollator, sampler: BatchPlanSampler) -> None:
        self.embedder = embedder
        self.config = config
        self.collator = collator
        self.sampler = sampler
        train = config.train
        self.loss = ContrastiveLoss.from_config(train)
        if train.learn_temperature:
            embedder.add_module("loss", self.loss)  # so that the optimiser, clipping and `zero_grad` find it
        self.step_function = CachedStep(
            embedder, self.loss, seed=config.seed, autocast=train.bf16, vision_cache_mib=train.vision_cache_mib
        )
        self.window = _Window()
        super().__init__(model=embedder, args=training_arguments(config, sampler.world_size))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Progress(sampler.start, config.train.steps))

    def get_train_dataloader(self) -> _Batches:
        return _Batches(self)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One cached step; every rank returns the global mean loss. Raises `RunError` on all ranks if not finite."""
        self.embedder.train()
        result = self.step_function(inputs, self.state.global_step)
        if not torch.isfinite(torch.tensor(result.loss)):
            raise RunError(
                f"loss is {result.loss} at step {self.state.global_step + 1}; the step was not applied. Lower train.lr,"
                f" or resume from the last checkpoint in {self.config.output_dir}"
            )
        self.window.add(result, inputs)
        return torch.tensor(result.loss, device=self.args.device)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        assert num_batches == 1, "gradient accumulation is replaced by the cached step"
        started = time.perf_counter()
        try:
            samples = [next(epoch_iterator)]
        except StopIteration:
            samples = []
        except DataError as error:  # from a worker it comes with the worker's traceback around it
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None
        self.window.waited += time.perf_counter() - started
        return samples, None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the parent's estimate knows neither chunks nor pictures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics.jsonl (rank 0) beside what the parent does."""
        if "loss" in logs:
            step = self.state.global_step
            self.state.epoch = step / self.sampler.batches_per_epoch  # the parent counts from the resumed step
            logs.update(self.window.summary(self.config.batch.size))
            self.window = _Window()
            if self.is_world_process_zero():
                line = {"step": step, "epoch": round(self.state.epoch, 6), **logs}
                with (Path(self.config.output_dir) / METRICS).open("a") as file:
                    file.write(json.dumps(line) + "\n")
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapter, tokenizer and image budget; nothing pickled."""
        folder = Path(output_dir or self.config.output_dir)
        save_adapter(self.embedder, folder)
        self.loss.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.config.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # a torn one of an earlier attempt
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_complete(folder, {"step": self.state.global_step, "world_size": self.args.world_size})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = load_full if self.config.model.train == "full" else load_trainable
        load(self.embedder.backbone, Path(resume_from_checkpoint))
        self.loss.load(Path(resume_from_checkpoint))

    def run(self, checkpoint: Path | None) -> None:
        """Train to the last step, from a checkpoint if given.

        An `InputError` on the way (a picture that does not decode, a loss that is not finite) leaves a checkpoint of
        the steps before it; with several ranks, where another rank may be waiting, the last regular one remains.
        """
        assert self.sampler.start == (0 if checkpoint is None else checkpoint_step(checkpoint))
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except InputError:
            if self.args.world_size == 1 and self.state.global_step > self.sampler.start:
                self._save_checkpoint(self.model, None)  # a bad row must not cost the steps before it
            raise


class _Batches:
    """The loader of a rank: batches from the sampler, collated in workers, never re-sharded.

    Its length is that of the whole run, so that the parent sees one long epoch; it yields what is left of it.
    """

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        collator, self.sampler = trainer.collator, trainer.sampler
        workers = trainer.config.train.workers
        self.loader: DataLoader[Any] = DataLoader(
            Rows([len(d) for d in collator.datasets]),
            batch_sampler=self.sampler,
            collate_fn=collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(0),  # leaves the global random state alone
        )

    def __len__(self) -> int:
        assert self.sampler.steps is not None
        return self.sampler.steps

    def __iter__(self) -> Iterator[StepInputs]:
        return iter(self.loader)


class _Window:
    """Sums between two lines of the log."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.tokens = 0
        self.results: list[StepResult] = []

    def add(self, result: StepResult, inputs: StepInputs) -> None:
        self.results.append(result)
        self.tokens += inputs.num_tokens

    def summary(self, batch_size: int) -> dict[str, float]:
        seconds, count = time.perf_counter() - self.started, len(self.results)
        return {
            "in_batch_precision": sum(r.precision for r in self.results) / count,
            "positive_similarity": sum(r.positive for r in self.results) / count,
            "hardest_negative_similarity": sum(r.hardest_negative for r in self.results) / count,
            "pairs_per_second": batch_size * count / seconds,
            "tokens_per_second_per_rank": self.tokens / seconds,
            "waiting_for_data": self.waited / seconds,
        }


class _Progress(TrainerCallback):
    """A bar with the last loss; only on the first rank."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        label = "train" if state.is_world_process_zero else None
        self.bar = bar(self.steps, label, "step", initial=self.start, leave=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(
                {
                    "loss": f"{logs['loss']:.3f}",
                    "p@1": f"{logs['in_batch_precision']:.2f}",
                    "pairs/s": f"{logs['pairs_per_second']:.0f}",
                },
                refresh=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def save_adapter(embedder: Embedder, folder: Path) -> None:
    """Write the adapter in peft's layout, with tokenizer, image budget and the backbone's config beside it.

    Without an adapter all weights are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone: Any = embedder.backbone
    if not hasattr(backbone, "get_base_model"):
        save_full(embedder, folder)
        return
    backbone.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; ours is written at the end
    embedder.processor.save_pretrained(folder)
    backbone.get_base_model().config.save_pretrained(str(folder))
