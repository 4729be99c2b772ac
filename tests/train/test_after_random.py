"""`negatives.after_random`: mined hard negatives begin where the random batches end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from forks import Job
from test_ready import OPTIONS, best, losses, result, same_weights, shorten
from test_ready import short_intervals as short_intervals  # the fixture: asked every other step

from b3.config import load_config
from b3.data.datasets import load_datasets
from b3.data.items import item_id
from b3.errors import ConfigError
from b3.mining.recipe import mine_recipe
from b3.train.announce import describe
from b3.train.build import build_trainer, load_plans
from b3.train.sampler import build_sampler
from b3.train.stop import StopRequest
from train import main

AFTER = ["negatives.after_random=true"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("after")
    tiny.write_data(root / "data")
    tiny.write_model(root / "model")
    tiny.write_teacher(root)
    file = tiny.write_recipe(root, batch={"policy": "b3"}, negatives={"per_query": 2})
    mine_recipe(load_config(file))
    return file


def run(recipe: Path, name: str, *overrides: str) -> Path:
    folder = recipe.parent / name
    assert main([str(recipe), f"output_dir={folder}", *OPTIONS, *overrides]) == 0
    return folder


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize("policy", ["b3", "random_mixed"])
def test_rows_have_their_hard_negatives_from_the_first_step_of_the_plans(
    recipe: Path, policy: str, start: int, workers: int
) -> None:
    options = [f"batch.policy={policy}", "train.steps=8", "batch.random_steps=3", f"train.workers={workers}"]
    config = load_config(recipe, [*options, *AFTER])
    datasets = load_datasets(config)
    plans, sampler = load_plans(config, datasets), build_sampler(config, datasets, [])
    if policy == "b3":
        sampler = build_sampler(config, datasets, plans)
    trainer = build_trainer(config, datasets, plans, sampler, StopRequest())
    trainer.done = sampler.start = start
    found = list(trainer.batches())
    assert len(found) == 8 - start
    for step, (inputs, _) in enumerate(found, start=start):
        wanted = []
        for number, row in sampler.batch(step).tolist():
            negatives = plans[number].hard_negatives[row].tolist() if step >= 3 else []
            wanted += [item_id(datasets[number].target(n)) for n in (row, *negatives)]
        assert inputs.target_ids.tolist() == wanted
    assert "steps 1 to 3: random batches of one data set and without hard negatives" in describe(
        config, datasets, sampler, plans
    )


def test_until_then_a_run_is_one_without_hard_negatives(recipe: Path) -> None:
    after = run(recipe, "after", "batch.random_steps=3", *AFTER)
    plain = run(recipe, "plain", "batch.random_steps=3", "negatives.per_query=0")
    with_them = run(recipe, "with-them", "batch.random_steps=3")
    assert losses(after)[:3] == losses(plain)[:3] != losses(with_them)[:3]
    assert losses(after)[3] != losses(plain)[3]


def test_it_begins_where_the_student_is_ready_and_a_run_that_is_cut_off_goes_on(recipe: Path) -> None:
    step, share = best(run(recipe, "never", "batch.ready=1.0", *AFTER))
    auto = run(recipe, "auto", f"batch.ready={share}", *AFTER)
    told = run(recipe, "told", f"batch.random_steps={step}", *AFTER)
    assert result(auto)["random_steps"] == step < 8
    assert same_weights(auto, told) and losses(auto) == losses(told)
    for folder, option in ((auto, f"batch.ready={share}"), (told, f"batch.random_steps={step}")):
        for kept in (2, 6):
            torn = folder.with_name(f"{folder.name}-torn-{kept}")
            shutil.copytree(folder, torn)
            (torn / "result.json").unlink()
            for later in range(kept + 2, 9, 2):
                shutil.rmtree(torn / f"checkpoint-{later}")
            run(recipe, torn.name, option, *AFTER)
            assert same_weights(folder, torn) and losses(torn) == losses(folder)


def test_two_ranks_with_workers_give_the_run_of_one(recipe: Path) -> None:
    options = ["adapter.dropout=0", "batch.random_steps=3", *AFTER]
    alone, folder = run(recipe, "alone", *options), recipe.parent / "ranks"
    options = [*OPTIONS, *options, "train.workers=1"]
    job = Job(recipe.parent / "logs", str(recipe), f"output_dir={folder}", *options, ranks=2, prepare=shorten)
    assert job.wait() == [0, 0], job.text()
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"negatives.after_random needs batch.random_steps .*\(policy b3, random_steps 0\)"),
        (["batch.random_steps=auto", "batch.policy=random"], r"another policy than random \(policy random, "),
        (["batch.random_steps=auto", "negatives.per_query=0"], "after_random is for mined hard negatives"),
        (
            ["batch.random_steps=auto", "negatives.source=data"],
            "after_random is for mined hard negatives; set negatives.per_query and source mined",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [*AFTER, *overrides])
