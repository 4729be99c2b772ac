"""The training loop, in the order in which it runs.

Batch, cached step, clip, finite check, optimise, schedule, log, evaluate, save, stop: `Trainer.steps` is that list.
What a step computes is in `b3.train.step`, what a checkpoint holds in `b3.train.checkpoint`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from b3 import distributed
from b3.config import Config
from b3.data.datasets import EvalDataset, load_eval
from b3.errors import DataError, InputError, RunError
from b3.eval.run import evaluate_subset
from b3.files import sync, write_json
from b3.model.adapter import load_trainable
from b3.model.embedder import Embedder
from b3.model.encode import Encoder
from b3.model.workers import run_ahead
from b3.train import checkpoint as checkpoints
from b3.train import hardness
from b3.train.bad_rows import BadRows, GuardedCollator, Replaced
from b3.train.inputs import StepCollator, StepInputs
from b3.train.losses.loss import Loss
from b3.train.metrics import ProgressBar, Trackers, Window
from b3.train.optimizer import build_optimizer, build_schedule, schedule_at, trained_parameters
from b3.train.room import check_first_batch
from b3.train.sampler import BatchPlanSampler
from b3.train.shard import equal_chunks
from b3.train.step import CachedStep
from b3.train.stop import Stopped, StopRequest


class Trainer:
    """Trains the parameters of an `Embedder` that require a gradient.

    Args:
        embedder: with an adapter attached, or with weights of its own to train.
        loss: of the recipe; its parameters are trained too.
        config: the recipe.
        collator: from rows to the `StepInputs` of this rank.
        sampler: batches of this rank, started at the first step to run.
        request: asks the run to stop.
        evaluator: scores the weights as they are; needed with `eval.every`.
    """

    def __init__(
        self,
        embedder: Embedder,
        loss: Loss,
        config: Config,
        collator: StepCollator,
        sampler: BatchPlanSampler,
        request: StopRequest,
        evaluator: Evaluator | None,
    ) -> None:
        train = config.train
        self.embedder, self.loss, self.config = embedder, loss, config
        self.collator, self.sampler = collator, sampler
        self.request, self.evaluator = request, evaluator
        self.folder = Path(config.output_dir)
        self.metrics = self.folder / checkpoints.METRICS
        self.is_first = distributed.rank() == 0
        self.cached_step = CachedStep(
            embedder,
            loss,
            seed=config.seed,
            autocast=train.bf16,
            vision_cache_mib=train.vision_cache_mib,
            kept_chunks=train.kept_chunks,
        )
        self.parameters = trained_parameters(embedder, loss)
        self.optimizer = build_optimizer(self.parameters, embedder, train.lr, train.weight_decay)
        self.schedule = build_schedule(self.optimizer, train.schedule, train.warmup_steps, train.steps)
        self.window = Window(embedder, low_precision=train.bf16 or embedder.dtype == torch.bfloat16)
        self.bad_rows = BadRows(self.folder, sampler.start)
        self.first = self.done = sampler.start  # steps that were applied, before this part of the run and now
        self.is_shared_error = False  # every rank is about to raise the same

    def run(self, checkpoint: Path | None) -> bool:
        """Train to the last step, from a checkpoint if given; False if a signal has stopped it before that.

        An `InputError` that all ranks share (an image that does not decode, a loss that is not finite) leaves a
        checkpoint of the steps before it.

        Raises:
            Stopped: the signal came before the first step.
        """
        if checkpoint is not None:
            self.restore(checkpoint)
        if self.request.agreed():
            raise Stopped
        check_first_batch(self.collator, self.sampler, self.config.train.workers)
        self.bar = ProgressBar(self.done, self.config.train.steps, visible=self.is_first)
        self.trackers = Trackers(self.config if self.is_first else None)
        self.window.clear_times()
        try:
            finished = self.steps(self.batches())
            self.trackers.close()  # after an error nothing that may wait for a network comes before the message
            return finished
        except InputError:
            if self.is_shared_error and self.done > self.first:
                self.save()  # a bad row must not cost the steps before it
            raise
        finally:
            self.bar.close()

    def steps(self, batches: Iterator[tuple[StepInputs, list[Replaced]]]) -> bool:
        """The loop. Returns False where it was stopped before the last step."""
        train, evaluation = self.config.train, self.config.eval
        max_norm = train.max_grad_norm or float("inf")
        evaluate_every = evaluation.every if evaluation is not None else None
        for step in range(self.done, train.steps):
            inputs = self.next_batch(batches)
            self.embedder.train()
            result = self.cached_step(inputs, step)  # fills `.grad`, summed over the ranks
            norm = float(clip_grad_norm_(self.parameters.values(), max_norm))
            self.refuse_nonfinite(step, result.loss, norm)  # on all ranks, before anything is applied
            learning_rate = float(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.window.add(result, inputs)
            self.done = step + 1
            is_last = self.done == train.steps
            self.bar.update(self.done)
            is_stopped = self.request.agreed() and not is_last
            if self.done % train.log_every == 0:
                self.log(norm, learning_rate)
            if self.sampler.random_steps is None and self.done % hardness.EVERY == 0 and self.is_ready():
                batches = self.batches()  # those that were read ahead are random ones
            if self.done == hardness.asked_at(self.config, self.sampler.random_steps):
                self.ask_hardness()
            if evaluate_every is not None and (is_last or self.done % evaluate_every == 0):
                self.evaluate()
            if is_last or is_stopped or self.done % train.save_every == 0:
                self.save()
            if is_stopped:
                return False
        if self.sampler.random_steps is None and self.is_first:
            self.bar.note(
                f"all batches were random: at no step did the student find {self.config.batch.ready:.0%} of its"
                " targets in them; train longer, start from a trained model, or lower batch.ready"
            )
        return True

    def batches(self) -> Iterator[tuple[StepInputs, list[Replaced]]]:
        """Inputs of this rank, collated ahead in workers from the first step to run on; and the rows replaced."""
        collate = GuardedCollator(self.collator, self.config.data.bad_images == "replace", self.config.seed)
        rows, workers, switch = iter(self.sampler), self.config.train.workers, self.sampler.random_steps
        if self.config.negatives.after_random:
            plain = replace(collate, collator=replace(self.collator, hard_negatives=None))
            num_plain = None if switch is None else max(0, switch - self.done)
            yield from run_ahead(plain, islice(rows, num_plain), workers, plain.describe)
        yield from run_ahead(collate, rows, workers, collate.describe)

    def next_batch(self, batches: Iterator[tuple[StepInputs, list[Replaced]]]) -> StepInputs:
        """The next inputs of this rank; all ranks raise if one of them cannot read its rows."""
        started = time.perf_counter()
        problem: DataError | None = None
        inputs: StepInputs | None = None
        replaced: list[Replaced] = []
        try:
            inputs, replaced = next(batches)
        except DataError as error:
            problem = error
        self.window.waited += time.perf_counter() - started
        num_chunks = 0 if inputs is None else inputs.num_chunks
        status = distributed.numbers_of_ranks([problem is not None, len(replaced), num_chunks])
        failures = [rank for rank, part in enumerate(status) if part[0]]
        if failures:
            self.is_shared_error = True
            raise problem or RunError(f"rank {failures[0]} cannot read its rows (see its message); all ranks stop")
        assert inputs is not None
        if any(part[1] for part in status):
            self.note_replaced(replaced)
        if self.config.model.shard:
            inputs = equal_chunks(inputs, int(max(part[2] for part in status)))
        return inputs

    def note_replaced(self, replaced: list[Replaced]) -> None:
        """List the rows that gave their place to others; all ranks raise once there are too many."""
        everyone = [entry for part in distributed.gather_objects([asdict(r) for r in replaced]) for entry in part]
        self.bad_rows.add(self.done + 1, everyone, self.is_first)
        most = self.config.data.max_bad_images
        if len(self.bad_rows) > most:
            last = everyone[-1]
            self.is_shared_error = True
            raise DataError(
                f"{len(self.bad_rows)} rows could not be read, more than data.max_bad_images {most}; the"
                f" last: {last['data_set']} row {last['row']}: {last['problem']}. All are in {self.bad_rows.file}"
            )

    def refuse_nonfinite(self, step: int, loss: float, norm: float) -> None:
        """Raise `RunError` on all ranks, which hold the same numbers, if one is not finite; writes the step's rows."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        file = self.folder / f"nonfinite-step-{step + 1}.json"
        if self.is_first:
            facts = {"step": step + 1, "loss": str(loss), what: str(value), "rows": self.rows_of(step)}
            write_json(file, facts, ensure_ascii=False)
        self.is_shared_error = True
        raise RunError(
            f"{what} is {value} at step {step + 1}; the step was not applied, its rows are in {file}. Lower train.lr,"
            f" or resume from the last checkpoint in {self.folder}"
        )

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """The rows of a step over all ranks, by data set and number, with their texts and images."""
        rows = []
        for number, row in self.sampler.batch(step).tolist():
            dataset = self.collator.datasets[number]
            query, target = dataset.query(row).describe(), dataset.target(row).describe()
            rows.append({"data_set": dataset.name, "row": row, "query": query, "target": target})
        return rows

    def log(self, norm: float, learning_rate: float) -> None:
        """A line of metrics.jsonl: means since the last one; a collective call."""
        summary = self.window.summary(self.config.batch.size)
        self.window.clear()
        if not self.is_first:
            return
        line = {
            "step": self.done,
            "epoch": round(self.done / self.sampler.batches_per_epoch, 6),
            "loss": summary["loss"],
            "grad_norm": norm,
            "learning_rate": learning_rate,
            **summary,
            "replaced_rows": len(self.bad_rows),
        }
        checkpoints.append_log(self.metrics, line)
        self.bar.show(summary)
        self.trackers.log("train", line, self.done)

    @contextmanager
    def asking(self) -> Iterator[Encoder]:
        """An encoder of the student as it is, whose use changes nothing in training."""
        started = time.perf_counter()
        with undisturbed(self.embedder, self.config.train.bf16):
            yield Encoder(self.embedder, workers=self.config.train.workers, on_error="skip")
        self.window.started += time.perf_counter() - started  # not the time of steps

    def is_ready(self) -> bool:
        """Let mined batches begin if the student finds enough of its targets in random ones; a collective call."""
        with self.asking() as encoder:
            found = hardness.precision(self.collator.datasets, self.sampler, self.done, encoder)
        is_ready = found >= self.config.batch.ready
        if is_ready:
            self.sampler.begin_plans(self.done)
        if self.is_first:
            line = {"step": self.done, "ready_precision": found, "random_steps": self.sampler.random_steps}
            checkpoints.append_log(self.metrics, line)
            if is_ready:
                self.bar.note(f"the student finds {found:.0%} of its targets: mined batches after step {self.done}")
        return is_ready

    def ask_hardness(self) -> None:
        """Say whether mined batches are too hard for the student as it is; a collective call."""
        with self.asking() as encoder:
            found = hardness.measure(self.config, self.collator.datasets, self.sampler, self.done, encoder)
        if self.is_first:
            line = {"step": self.done, "mined_precision": found.mined, "random_precision": found.random}
            checkpoints.append_log(self.metrics, line)
            if found.is_too_hard:
                self.bar.note(found.advice(self.done))

    def evaluate(self) -> None:
        """Score the evaluation subsets with the weights as they are; all ranks share the work."""
        assert self.evaluator is not None
        started = time.perf_counter()
        scores = self.evaluator()
        seconds = time.perf_counter() - started
        self.window.started += seconds  # not the training's time
        if self.is_first:
            line = {"step": self.done, "evaluation": scores, "seconds": round(seconds, 2)}
            checkpoints.append_log(self.metrics, line)
            self.trackers.log("eval", scores, self.done)

    def save(self) -> None:
        """Write a checkpoint of the steps that were applied; a collective call."""
        started = time.perf_counter()
        random_states = distributed.gather_objects(checkpoints.random_state())
        if self.is_first:
            for log in (self.metrics, self.bad_rows.file):  # on disk before a checkpoint relies on their lines
                if log.exists():
                    sync(log)
            staged = checkpoints.stage(self.folder)
            self.embedder.save(staged)
            self.loss.save(staged)
            checkpoints.save_moments(staged, self.optimizer, self.parameters)
            write_json(staged / checkpoints.RANDOM, random_states, indent=None)
            facts = {
                "step": self.done,
                "world_size": len(random_states),
                "random_steps": self.sampler.random_steps,
                "window": self.window.state(),
            }
            checkpoints.publish(staged, self.folder, facts)
            checkpoints.prune(self.folder, self.config.train.keep_checkpoints)
        distributed.barrier()
        self.window.started += time.perf_counter() - started  # not the time of steps

    def restore(self, checkpoint: Path) -> None:
        """Put everything back to where `save` was called."""
        assert self.done == checkpoints.checkpoint_step(checkpoint), "the sampler starts where the checkpoint ends"
        if self.config.model.train == "full":
            self.embedder.load_weights(checkpoint)
        else:
            load_trainable(self.embedder.backbone, checkpoint)
        self.loss.load(checkpoint)
        checkpoints.load_moments(checkpoint, self.optimizer, self.parameters)
        schedule_at(self.schedule, self.done)
        self.window.restore(checkpoints.checkpoint_facts(checkpoint)["window"])
        checkpoints.restore_random_state(checkpoint, distributed.rank())


@contextmanager
def undisturbed(embedder: Embedder, autocast: bool) -> Iterator[None]:
    """Encode in the precision of training, and take nothing from its random state."""
    device = embedder.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        yield


class Evaluator:
    """Scores the recipe's `eval` section with the weights as they are; ranks share the encoding, all get the scores.

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
        encoder = Encoder(self.embedder, workers=self.workers)
        with undisturbed(self.embedder, self.autocast):
            scores = {d.name: float(evaluate_subset(d, encoder).precision) for d in self.datasets}
        return {**scores, "mean": sum(scores.values()) / len(scores)}
