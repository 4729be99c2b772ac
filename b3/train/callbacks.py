"""What happens at the end of each step beside the step: the bar, the estimate of the time, stopping, evaluating."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from b3.console import bar, duration
from b3.train.stop import Stopped, StopRequest

TIMED_STEPS = 5


class Progress(TrainerCallback):
    """A bar with the last loss, and after five steps the time that is left; only on the first rank."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps
        self.after_first = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        label = "train" if state.is_world_process_zero else None
        self.bar = bar(self.steps, label, "step", initial=self.start, leave=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        done = state.global_step - self.start
        if done == 1:  # the first step warms up
            self.after_first = time.perf_counter()
        if done == TIMED_STEPS and state.is_world_process_zero and state.global_step < self.steps:
            each = (time.perf_counter() - self.after_first) / (TIMED_STEPS - 1)
            left = each * (self.steps - state.global_step)
            self.bar.write(f"  about {duration(left)} to go ({duration(each)} a step)")

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


class Stop(TrainerCallback):
    """Ends the run after the step in which any rank was asked to, with a checkpoint."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.request.agreed():
            raise Stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.request.agreed() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class Evaluate(TrainerCallback):
    """Asks for an evaluation every so many steps, and after the last one."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True
