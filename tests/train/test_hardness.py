"""The question after the first hundred steps: are mined batches too hard for this student?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file

from b3 import Embedder
from b3.config import Config, load_config
from b3.data.datasets import load_datasets
from b3.mining.recipe import mine_recipe
from b3.model.encode import Encoder
from b3.train import hardness
from b3.train.build import load_plans
from b3.train.sampler import BatchPlanSampler, build_sampler, random_rows
from train import main


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hardness")
    tiny.write_data(root / "data")
    tiny.write_model(root / "model")
    tiny.write_teacher(root)
    file = tiny.write_recipe(root, batch={"policy": "b3"})
    mine_recipe(load_config(file))
    return file


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def precision_by_loops(config: Config, batches: list[np.ndarray], model: Embedder) -> float:
    """The share of queries won, pair by pair, a rival being a column of another text and another query."""
    datasets, won = load_datasets(config), []
    for batch in batches:
        pairs = [(datasets[number].query(row), datasets[number].target(row)) for number, row in batch.tolist()]
        told = [[item.describe() for item in pair] for pair in pairs]
        vectors = [[Encoder(model).encode([item])[0] for item in pair] for pair in pairs]
        for i, (query, target) in enumerate(vectors):
            rivals = [j for j in range(len(told)) if told[j][0] != told[i][0] and told[j][1] != told[i][1]]
            own = query @ target / np.linalg.norm(query) / np.linalg.norm(target)
            scores = [query @ vectors[j][1] / np.linalg.norm(query) / np.linalg.norm(vectors[j][1]) for j in rivals]
            won.append(own > max(scores))
    return float(np.mean(won))


def first_of_each(sampler: BatchPlanSampler, step: int, each: int) -> list[np.ndarray]:
    """The next batches of either data set."""
    batches = [sampler.batch(i) for i in range(step, step + 40)]
    return [batch for number in (0, 1) for batch in [b for b in batches if b[0, 0] == number][:each]]


def test_precision_is_that_of_a_loop_over_pairs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardness, "QUERIES", 30)  # four batches of 12
    config = load_config(recipe)
    model = Embedder.from_pretrained(config.model.name, dtype="float32")
    datasets = load_datasets(config)
    sampler = build_sampler(config, datasets, load_plans(config, datasets))
    random = build_sampler(load_config(recipe, ["batch.policy=random"]), datasets, [])
    found = hardness.measure(config, datasets, sampler, 5, Encoder(model))
    for share, drawn in ((found.mined, sampler), (found.random, random)):
        assert share == pytest.approx(precision_by_loops(config, first_of_each(drawn, 5, 2), model), abs=1e-9)
    monkeypatch.setattr(hardness, "ROWS", 5)
    parts = [part for batch in first_of_each(random, 5, 2) for part in (batch[:5], batch[5:10], batch[10:])]
    in_parts = [len(part) * precision_by_loops(config, [part], model) for part in parts]
    share = hardness.precision(datasets, random, 5, Encoder(model))
    assert share == pytest.approx(sum(in_parts) / 48, abs=1e-9) and share > found.random


def test_each_data_set_counts_as_often_as_its_batches() -> None:
    """Whose batches come next is chance, and data sets differ."""
    sampler = BatchPlanSampler([random_rows(640), random_rows(128), random_rows(64)], 64, random_steps=None)
    found = hardness.next_batches(sampler, 7)
    assert [number for batch, _ in found for number in {*batch[:, 0].tolist()}].count(0) == 3
    shares = {number: sum(share for batch, share in found if batch[0, 0] == number) for number in range(3)}
    assert len(found) == 9 and shares == pytest.approx({0: 10 / 13, 1: 2 / 13, 2: 1 / 13})
    (batch, share) = hardness.next_batches(BatchPlanSampler(random_rows(2048), 1024, steps=9), 3)[0]
    assert share == 1 and len(batch) == 1024


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        (["train.steps=200"], 100),
        (["train.steps=200", "batch.random_steps=150"], 150),
        (["train.steps=200", "batch.policy=random"], None),
        (["train.steps=100"], None),
    ],
)
def test_when_a_run_asks(recipe: Path, overrides: list[str], step: int | None) -> None:
    config = load_config(recipe, overrides)
    assert hardness.asked_at(config, config.batch.random_steps) == step  # type: ignore[arg-type]
    assert hardness.asked_at(config, None) is None


def test_too_hard_is_less_than_half_of_the_control_or_a_control_that_finds_little() -> None:
    assert not hardness.Hardness(mined=0.2, random=0.4).is_too_hard
    assert hardness.Hardness(mined=0.2, random=0.2).is_too_hard
    found = hardness.Hardness(mined=0.1, random=0.4)
    assert found.is_too_hard
    said = found.advice(100)
    assert "10 % of the targets in mined batches and 40 % in random ones" in said
    assert "batch.random_steps=auto" in said


def test_a_run_says_so_once_and_trains_as_if_it_had_not_asked(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, runs = recipe.parent, {}
    for name, asked in (("asks", 2), ("does-not", 100)):
        monkeypatch.setattr(hardness, "STEPS", asked)
        monkeypatch.setattr(hardness, "LEAST", 1e9)  # always too hard
        capsys.readouterr()
        assert main([str(recipe), f"output_dir={folder / name}", "adapter.dropout=0.2"]) == 0
        runs[name] = capsys.readouterr().out.count("batches may be too hard for this student: after 2 steps")
    assert runs == {"asks": 1, "does-not": 0}
    asked = [line for line in lines(folder / "asks") if "mined_precision" in line]
    assert [line["step"] for line in asked] == [2] and asked[0].keys() == {
        "step",
        "mined_precision",
        "random_precision",
    }
    losses = [[line["loss"] for line in lines(folder / name) if "loss" in line] for name in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    weights = [load_file(folder / name / "adapter_model.safetensors") for name in runs]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
