"""A thin subclass of `transformers.Trainer`: its loop, optimiser, schedule and trackers, our step and batches."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from b3 import distributed
from b3.config import Config
from b3.errors import DataError, InputError, RunError
from b3.files import write_json
from b3.model.adapter import load_trainable
from b3.model.checkpoint import load_full, save_full
from b3.model.embedder import Embedder
from b3.model.workers import run_ahead
from b3.train import checkpoint as checkpoints
from b3.train.bad_rows import BadRows, GuardedCollator, Replaced
from b3.train.callbacks import Evaluate, Progress, Stop
from b3.train.collate import Rows, StepCollator
from b3.train.inputs import StepInputs
from b3.train.losses.info_nce import ContrastiveLoss
from b3.train.metrics import Window
from b3.train.ranks import Roll
from b3.train.sampler import BatchPlanSampler
from b3.train.shard import equal_chunks
from b3.train.step import CachedStep
from b3.train.stop import StopRequest


def training_arguments(config: Config, world_size: int) -> TrainingArguments:
    """The part of a recipe that `transformers` takes over."""
    train = config.train
    return TrainingArguments(
        output_dir=config.output_dir,
        run_name=config.name,
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
        seed=config.seed,
        ignore_data_skip=True,  # the sampler starts at the right batch by itself
        remove_unused_columns=False,
        disable_tqdm=True,  # our own bar
        report_to=list(train.trackers),
        use_cpu=not torch.cuda.is_available(),
    )


class ContrastiveTrainer(Trainer):
    """Trains an `Embedder`'s adapter with the cached contrastive step.

    Args:
        embedder: with a peft-wrapped backbone.
        config: the recipe.
        collator: builds a rank's `StepInputs`.
        sampler: batches of this rank, started at the first step to run.
        request: asks the run to stop; default: never.
        evaluator: scores by subset with the weights as they are; needed with `eval.every`.
    """

    def __init__(
        self,
        embedder: Embedder,
        config: Config,
        collator: StepCollator,
        sampler: BatchPlanSampler,
        request: StopRequest | None = None,
        evaluator: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.embedder = embedder
        self.config = config
        self.collator = collator
        self.sampler = sampler
        self.folder = Path(config.output_dir)
        train = config.train
        self.loss = ContrastiveLoss.from_config(train)
        if train.learn_temperature:
            embedder.add_module("loss", self.loss)  # so that the optimiser, clipping and `zero_grad` find it
        self.step_function = CachedStep(
            embedder, self.loss, seed=config.seed, autocast=train.bf16, vision_cache_mib=train.vision_cache_mib
        )
        self.window = Window(embedder, low_precision=train.bf16 or embedder.dtype == torch.bfloat16)
        self.bad_rows = BadRows(self.folder, sampler.start)
        self.roll = Roll()
        self.evaluator = evaluator
        self.last_loss = 0.0
        self.agreed = False  # every rank is about to raise the same
        super().__init__(model=embedder, args=training_arguments(config, sampler.world_size))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Progress(sampler.start, train.steps))
        if config.eval is not None and config.eval.every is not None:
            self.add_callback(Evaluate(config.eval.every))
        self.stop = Stop(request or StopRequest())
        self.add_callback(self.stop)

    def get_train_dataloader(self) -> _Batches:
        return _Batches(self)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One cached step; every rank returns the global mean loss. Raises `RunError` on all ranks if not finite."""
        self.embedder.train()
        result = self.step_function(inputs, self.state.global_step)
        self.last_loss = result.loss
        self._check_finite("loss", result.loss)
        self.window.add(result, inputs)
        return torch.tensor(result.loss, device=self.args.device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the summed gradients, the same on every rank; the last look before the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite("gradient norm", float(norm))
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if torch.isfinite(torch.tensor(value)):
            return
        step = self.state.global_step + 1
        file = self.folder / f"nonfinite-step-{step}.json"
        if self.is_world_process_zero():
            facts = {"step": step, "loss": str(self.last_loss), what: str(value), "rows": self._rows_of(step - 1)}
            write_json(file, facts, ensure_ascii=False)
        self.agreed = True
        raise RunError(
            f"{what} is {value} at step {step}; the step was not applied, its rows are in {file}. Lower train.lr, or"
            f" resume from the last checkpoint in {self.folder}"
        )

    def _rows_of(self, index: int) -> list[dict[str, Any]]:
        """The rows of a global batch, by data set and number, with their texts and pictures."""
        places, rows = Rows([len(d) for d in self.collator.datasets]), []
        for place in self.sampler.batch(index).tolist():
            number, row = places[place][:2]
            dataset = self.collator.datasets[number]
            query, target = dataset.query(row).describe(), dataset.target(row).describe()
            rows.append({"data_set": dataset.name, "row": row, "query": query, "target": target})
        return rows

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The next batch of this rank; all ranks raise if one of them has none."""
        assert num_batches == 1, "gradient accumulation is replaced by the cached step"
        started = time.perf_counter()
        problem: DataError | None = None
        samples: list[Any] = []
        replaced: list[Replaced] = []
        try:
            inputs, replaced = next(epoch_iterator)
            samples = [inputs]
        except StopIteration:
            pass
        except DataError as error:
            problem = error
        self.window.waited += time.perf_counter() - started
        chunks = samples[0].num_chunks if samples else 0
        status = distributed.numbers_of_ranks([problem is not None, len(replaced), chunks])
        failed = [rank for rank, part in enumerate(status) if part[0]]
        if failed:
            self.agreed = True
            raise problem or RunError(f"rank {failed[0]} cannot read its rows (see its message); all ranks stop")
        if any(part[1] for part in status):
            self._note_replaced(replaced)
        if self.config.model.shard and samples:
            samples = [equal_chunks(samples[0], int(max(part[2] for part in status)))]
        return samples, None

    def _note_replaced(self, replaced: list[Replaced]) -> None:
        everyone = [entry for part in distributed.gather_objects([asdict(r) for r in replaced]) for entry in part]
        self.bad_rows.add(self.state.global_step + 1, everyone, self.is_world_process_zero())
        data = self.config.data
        if len(self.bad_rows) > data.max_bad_images:
            last = everyone[-1]
            self.agreed = True
            raise DataError(
                f"{len(self.bad_rows)} rows could not be read, more than data.max_bad_images {data.max_bad_images}; the"
                f" last: {last['data_set']} row {last['row']}: {last['problem']}. All are in {self.bad_rows.file}"
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay spares what the parent's rule spares (biases, norms) and a learned temperature."""
        spared = {f"loss.{name}" for name, _ in self.loss.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the parent's estimate knows neither chunks nor pictures

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Write a line of metrics.jsonl (rank 0) beside what the parent does."""
        if "loss" in logs:
            step = self.state.global_step
            self.state.epoch = step / self.sampler.batches_per_epoch  # the parent counts from the resumed step
            logs.update(self.window.summary(self.config.batch.size))
            logs["replaced_rows"] = len(self.bad_rows)
            self.window.clear()
            if self.is_world_process_zero():
                checkpoints.append_metrics(self.folder, {"step": step, "epoch": round(self.state.epoch, 6), **logs})
        super().log({key: value for key, value in logs.items() if value is not None}, start_time)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Score the evaluation subsets with the weights as they are; all ranks share the work."""
        assert self.evaluator is not None
        started = time.perf_counter()
        scores = self.evaluator()
        seconds = time.perf_counter() - started
        self.window.started += seconds  # not the training's time
        self.control.should_evaluate = False
        line = {"step": self.state.global_step, "evaluation": scores, "seconds": round(seconds, 2)}
        if self.is_world_process_zero():
            checkpoints.append_metrics(self.folder, line)
        super().log({f"eval_{name}": value for name, value in scores.items()})
        return scores

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapter, tokenizer and image budget; nothing pickled."""
        folder = Path(output_dir or self.config.output_dir)
        save_adapter(self.embedder, folder)
        self.loss.save(folder)

    def _get_output_dir(self, trial: Any) -> str:
        """Where the parent writes a checkpoint: out of sight until it is complete."""
        return str(self.folder / checkpoints.STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        staging, started = Path(self._get_output_dir(trial)), time.perf_counter()
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)  # a torn one of an earlier attempt
            checkpoints.sync_metrics(self.folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            step = self.state.global_step
            facts = {"step": step, "world_size": self.args.world_size, "window": self.window.state()}
            checkpoints.publish(staging / f"checkpoint-{step}", self.folder, facts)
            staging.rmdir()
            checkpoints.prune(self.folder, self.config.train.keep_checkpoints)
        self.window.started += time.perf_counter() - started  # not the time of steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load = load_full if self.config.model.train == "full" else load_trainable
        load(self.embedder.backbone, folder)
        self.loss.load(folder)
        self.window.restore(checkpoints.checkpoint_facts(folder).get("window", []))

    def run(self, checkpoint: Path | None) -> bool:
        """Train to the last step, from a checkpoint if given; False if a signal has stopped it before that.

        An `InputError` that all ranks share (a picture that does not decode, a loss that is not finite) leaves a
        checkpoint of the steps before it.
        """
        assert self.sampler.start == (0 if checkpoint is None else checkpoints.checkpoint_step(checkpoint))
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except InputError:
            if self.agreed and self.state.global_step > self.sampler.start:
                self._save_checkpoint(self.model, None)  # a bad row must not cost the steps before it
            raise
        except RuntimeError as error:
            lost = self.roll.lost(error, self.state.global_step)
            if lost is None:
                raise
            raise lost from None
        return not self.stop.stopped


class _Batches:
    """The loader of a rank: batches from the sampler, collated in workers, never re-sharded.

    Its length is that of the whole run, so that the parent sees one long epoch; it yields what is left of it.
    """

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        collator, self.sampler, config = trainer.collator, trainer.sampler, trainer.config
        self.workers = config.train.workers
        self.rows = Rows([len(d) for d in collator.datasets])
        self.collate = GuardedCollator(collator, config.data.bad_images == "replace", config.seed)

    def __len__(self) -> int:
        assert self.sampler.steps is not None
        return self.sampler.steps

    def __iter__(self) -> Iterator[tuple[StepInputs, list[Replaced]]]:
        tasks = ([self.rows[row] for row in batch] for batch in self.sampler)
        return run_ahead(self.collate, tasks, self.workers, self.collate.describe)


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
    embedder.save_settings(folder)
    backbone.get_base_model().config.save_pretrained(str(folder))
