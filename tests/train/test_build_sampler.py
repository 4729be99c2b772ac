"""From a recipe to its batches: policies, and what is said about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from b3.config import Config, load_config
from b3.data.datasets import load_datasets
from b3.mining.recipe import mine_recipe
from b3.train.announce import describe
from b3.train.build import load_plans
from b3.train.sampler import build_sampler, pool_numbers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    tiny.write_data(folder / "data", rows=50)
    tiny.write_teacher(folder, rows=50)
    mine_recipe(load_config(tiny.write_recipe(folder)))
    return folder


def recipe(root: Path, *overrides: str, **changes: Any) -> Config:
    return load_config(tiny.write_recipe(root, "x.yaml", **changes), list(overrides))


@pytest.mark.parametrize(
    ("policy", "pools", "several"),
    [("b3", [0, 1], False), ("b3_merged", [0, 0], True), ("b3_mixed", [0, 0], True), ("random", [0, 1], False),
     ("random_mixed", [0, 0], True)],
)  # fmt: skip
def test_policies(root: Path, policy: str, pools: list[int], several: bool) -> None:
    labelled = [{"subset": name, "family": "classification"} for name in ("pictures", "words")]
    config = recipe(root, batch={"policy": policy}, data={"datasets": labelled})
    assert pool_numbers(config) == pools
    datasets = load_datasets(config)
    plans = load_plans(config, datasets)
    sampler = build_sampler(config, datasets, plans)
    batches = [sampler.batch(step) for step in range(6)]
    assert any(len(set(batch[:, 0].tolist())) == 2 for batch in batches) == several
    mined = {frozenset((d, row) for row in c.tolist()) for d, p in enumerate(plans) for c in p.communities}
    parts = [part for batch in batches for part in batch.reshape(-1, 4, 2).tolist()]
    whole = sum(frozenset((d, row) for d, row in part) in mined for part in parts)
    assert whole >= 16 if policy.startswith("b3") else whole == 0
    assert ("batches across pictures + words: 8 an epoch" in describe(config, datasets, sampler, plans)) == several


def test_the_description_names_what_was_chosen(root: Path) -> None:
    config = recipe(root, "data.datasets.0.weight=0.5", batch={"policy": "b3"})
    datasets = load_datasets(config)
    plans = load_plans(config, datasets)
    said = describe(config, datasets, build_sampler(config, datasets, plans), plans)
    assert "policy b3 (3 communities of 4)" in said
    assert "pictures: 50 rows, weight 0.5, 2 batches per epoch" in said
    assert "words: 50 rows, 4 batches per epoch" in said


def test_preset_paper_keeps_the_batches_of_the_first_epoch(root: Path) -> None:
    config = recipe(root, "mining.preset=paper", "batch.policy=random")
    datasets = load_datasets(config)
    sampler = build_sampler(config, datasets, [])
    assert "policy random, the same batches every epoch" in describe(config, datasets, sampler, [])
    first, second = (sampler.epochs.epoch(epoch).tolist() for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_random_steps_come_before_the_mined_ones(root: Path) -> None:
    policies = {
        "random": {"policy": "random", "random_steps": 3},
        "b3": {"policy": "b3"},
        "both": {"policy": "b3", "random_steps": 3},
    }
    drawn, told = {}, {}
    for name, batch in policies.items():
        config = recipe(root, batch=batch)
        datasets = load_datasets(config)
        plans = load_plans(config, datasets)
        sampler = build_sampler(config, datasets, plans)
        drawn[name] = [sampler.batch(step).tolist() for step in range(6)]
        told[name] = "steps 1 to 3: random batches of one data set" in describe(config, datasets, sampler, plans)
    assert drawn["both"] == drawn["random"][:3] + drawn["b3"][:3]
    assert told == {"random": False, "b3": False, "both": True}


def test_only_classification_sets_are_merged(root: Path) -> None:
    families = ("retrieval", "classification", "vqa", "classification")
    entries = [{"subset": f"set{i}", "family": family} for i, family in enumerate(families)]
    config = recipe(root, batch={"policy": "b3_merged"}, data={"datasets": entries})
    assert pool_numbers(config) == [0, 1, 2, 1]
