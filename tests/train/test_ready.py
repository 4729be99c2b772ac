"""`batch.random_steps: auto`: random batches until the student finds enough of its targets in them, then mined ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from forks import Job
from safetensors.torch import load_file
from test_hardness import first_of_each, lines, precision_by_loops
from test_hardness import recipe as recipe  # the fixture: a recipe whose data sets are mined

from b3 import Embedder
from b3.config import load_config
from b3.data.datasets import load_datasets
from b3.train import hardness
from b3.train.sampler import build_sampler
from train import main

OPTIONS = ["train.steps=8", "train.keep_checkpoints=9", "adapter.dropout=0.2", "batch.random_steps=auto"]


def shorten(_: int = 0) -> None:
    hardness.EVERY, hardness.STEPS, hardness.QUERIES = 2, 3, 60


@pytest.fixture(autouse=True, scope="module")
def short_intervals() -> Iterator[None]:
    before = hardness.EVERY, hardness.STEPS, hardness.QUERIES
    shorten()
    yield
    hardness.EVERY, hardness.STEPS, hardness.QUERIES = before


def run(recipe: Path, name: str, *overrides: str) -> Path:
    folder = recipe.parent / name
    assert main([str(recipe), f"output_dir={folder}", *OPTIONS, *overrides]) == 0
    return folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def asked(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "ready_precision" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def best(never: Path) -> tuple[int, float]:
    """(step, share): the first step at which a student that never leaves random batches finds its best share."""
    found = {line["step"]: line["ready_precision"] for line in asked(never)[:3]}
    step = max(found, key=lambda step: (found[step], -step))
    return step, found[step] - 1e-6


@pytest.fixture(scope="module")
def never(recipe: Path) -> Path:
    return run(recipe, "never", "batch.ready=1.0")


@pytest.fixture(scope="module")
def switch(never: Path) -> tuple[int, float]:
    return best(never)


@pytest.fixture(scope="module")
def auto(recipe: Path, switch: tuple[int, float]) -> Path:
    return run(recipe, "auto", f"batch.ready={switch[1]}")


def test_a_student_that_is_never_ready_trains_as_the_control_and_says_so(
    recipe: Path, never: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = run(recipe, "control", "batch.random_steps=0", "batch.policy=random")
    assert same_weights(never, control) and losses(never) == losses(control)
    assert [line["step"] for line in asked(never)] == [2, 4, 6, 8]
    assert result(never)["random_steps"] is None
    capsys.readouterr()
    run(recipe, "told", "batch.ready=1.0", "train.steps=1", "train.save_every=1")
    said = capsys.readouterr().out
    assert "all batches were random: at no step did the student find 100% of its targets" in said
    assert "random batches of one data set until the student finds 100% of its targets there" in said


def test_what_is_asked_is_the_share_of_a_loop_over_pairs_of_the_next_random_batches(recipe: Path, never: Path) -> None:
    config = load_config(recipe, ["batch.policy=random"])
    sampler = build_sampler(config, load_datasets(config), [])
    for line in asked(never)[:2]:
        step = line["step"]
        model = Embedder.from_pretrained(config.model.name, adapter=never / f"checkpoint-{step}", dtype="float32")
        batches = first_of_each(sampler, step, 3)
        assert line["ready_precision"] == pytest.approx(precision_by_loops(config, batches, model), abs=1e-9)


def test_a_run_that_finds_its_switch_is_the_run_that_was_told_it(
    recipe: Path, auto: Path, switch: tuple[int, float]
) -> None:
    told = run(recipe, "told-the-step", f"batch.random_steps={switch[0]}")
    assert same_weights(auto, told) and losses(auto) == losses(told)
    assert [line["random_steps"] for line in asked(auto)] == [None] * (switch[0] // 2 - 1) + [switch[0]]
    assert result(auto)["random_steps"] == result(told)["random_steps"] == switch[0]
    both = [[line for line in lines(folder) if "mined_precision" in line] for folder in (auto, told)]
    assert both[0] == both[1] and [line["step"] for line in both[0]] == [max(3, switch[0])]


@pytest.mark.parametrize("kept", [2, 4, 6])
def test_a_run_that_is_cut_off_before_at_or_after_its_switch_goes_on_as_it_would_have(
    recipe: Path, auto: Path, switch: tuple[int, float], kept: int
) -> None:
    torn = recipe.parent / f"torn-{kept}"
    shutil.copytree(auto, torn)
    (torn / "result.json").unlink()
    for step in range(kept + 2, 9, 2):
        shutil.rmtree(torn / f"checkpoint-{step}")
    run(recipe, torn.name, f"batch.ready={switch[1]}")
    assert same_weights(auto, torn)
    assert tiny.without_times(lines(torn)) == tiny.without_times(lines(auto))
    assert result(torn)["random_steps"] == switch[0]


def test_a_run_of_constant_rate_that_is_made_longer_asks_where_a_long_one_does(recipe: Path, never: Path) -> None:
    options = ["train.schedule=constant", "batch.ready=0.01"]
    run(recipe, "longer", *options, "train.steps=2")
    longer = run(recipe, "longer", *options)
    assert same_weights(longer, run(recipe, "long", *options))
    assert result(longer)["random_steps"] == 2


def test_workers_read_ahead_anew_and_two_ranks_agree(recipe: Path) -> None:
    plain = ["adapter.dropout=0"]
    step, share = best(run(recipe, "plain", *plain, "batch.ready=1.0"))
    folder, options = recipe.parent / "ranks", [*plain, f"batch.ready={share}"]
    alone = run(recipe, "alone", *options)
    options = [*OPTIONS, *options, "train.workers=1"]
    job = Job(recipe.parent / "logs", str(recipe), f"output_dir={folder}", *options, ranks=2, prepare=shorten)
    assert job.wait() == [0, 0], job.text()
    assert [line["ready_precision"] for line in asked(folder)] == pytest.approx(
        [line["ready_precision"] for line in asked(alone)], abs=1e-9
    )
    assert result(folder)["random_steps"] == result(alone)["random_steps"] == step < 8
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)
