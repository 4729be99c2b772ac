"""What a recipe may say about batches: every contradiction is one line that names the key and the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from b3.config import Config, dump_config, load_config
from b3.errors import ConfigError

HARD = {"mining": {"variants": {"hard": {"p": 1}}}}
MIXED = {
    "mining": {"variants": {"hard": {"p": 1, "k": 6}}},
    "batch": {
        "policy": "b3",
        "schedule": [{"until": 0.5, "plans": {"base": 1.0}}, {"until": 1.0, "plans": {"base": 0.6, "hard": 0.4}}],
    },
}


def schedule(*phases: Any) -> list[dict[str, Any]]:
    return [{"until": until, "plans": plans} for until, plans in phases]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"random_share": 0.3}, "batch.random_share 0.3 has no effect with batch.policy random,"),
        ({"policy": "b3", "random_share": 0.1}, "batch of 12 rows with mining.k 4 is 3 communities, so the next share"),
        ({"policy": "b3", "random_share": 1.0}, "less than 1"),
        ({"policy": "b3", "size": 4, "random_share": 0.9}, "is a single community; use a smaller k"),
        ({"policy": "b3_merged"}, "merges data sets of family classification, and the recipe has 0"),
        ({"remix": "never"}, "'epoch' or 'frozen'"),
        ({"schedule": schedule((1.0, {"base": 1}))}, "batch.schedule has no effect with batch.policy random"),
        ({"policy": "b3_mixed", "size": 10}, "not a multiple of mining.k 4; use 8 or 12"),
    ],
)
def test_a_batch_that_cannot_be(tmp_path: Path, batch: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.write_recipe(tmp_path, batch=batch))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            schedule((0.5, {"base": 1}), (0.5, {"hard": 1})),
            "batch.schedule.1: until 0.5 ends at step 3 of 6, not after",
        ),
        (schedule((0.01, {"base": 1}), (1, {"hard": 1})), "batch.schedule.0: until 0.01 ends at step 0 of 6"),
        (schedule((0.5, {"hard": 1})), "batch.schedule ends at 0.5 of training; the last until must be 1.0"),
        (schedule((1, {"base": 0.5, "hard": 0.4})), "batch.schedule.0: the shares sum to 0.9"),
        (schedule((1, {"base": 0.9, "hard": 0.1})), "share 0.1 of 6 steps gives plan 'hard' no batch"),
        (schedule((1, {"base": 1.5, "hard": -0.5})), "the share -0.5 of plan 'hard' must be above 0"),
        (schedule((1, {"base": 0.5, "herd": 0.5})), "mining.variants.hard is in no phase of batch.schedule"),
        (schedule((1, {"hard": 0.5, "soft": 0.5})), "batch.schedule.0: no plan 'soft'; known: base, hard"),
        (schedule((1, {})), "'batch.schedule.0.plans'"),
        ([], "mining.variants.hard is in no phase"),
    ],
)
def test_a_schedule_that_cannot_be(tmp_path: Path, phases: list, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.write_recipe(tmp_path, **HARD, batch={"policy": "b3", "schedule": phases}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"base": {"p": 1}}, "mining.variants.base: the name must"),
        ({"Hard!": {"p": 1}}, "mining.variants.Hard!: the name must"),
        ({"hard": {}}, "mining.variants.hard changes nothing of mining"),
        ({"hard": {"p": 2, "m": 10}}, "mining.variants.hard changes nothing of mining"),
        ({"hard": {"pp": 2}}, "unknown key 'mining.variants.hard.pp'; did you mean 'p'?"),
        ({"hard": {"p": -2}}, "mining.p -2 must not be negative"),
        ({"hard": {"partitioner": "best"}}, "mining.variants.hard.partitioner: Input should be 'anneal'"),
        ({"hard": {"partitioner": "paper"}}, "mining.partitioner paper needs mining.edges mutual"),
        ({"hard": {"k": 5}}, "batch.size 12 is not a multiple of mining.variants.hard.k 5; use 10 or 15"),
    ],
)
def test_a_variant_that_cannot_be(tmp_path: Path, variants: dict, message: str) -> None:
    batch = {"policy": "b3", "schedule": schedule((1, {name: 1 / len(variants) for name in variants}))}
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.write_recipe(tmp_path, mining={"variants": variants}, batch=batch))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", ["0", "-1", ".inf", ".nan"])
def test_a_weight_is_a_positive_number(tmp_path: Path, weight: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.datasets\.0\.weight"):
        load_config(tiny.write_recipe(tmp_path), [f"data.datasets.0.weight={weight}"])


def test_a_variant_replaces_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    mining = {"refine_passes": 2, "veto": True, "variants": {"paper": {"edges": "mutual", "partitioner": "paper"}}}
    batch = {"policy": "b3", "schedule": schedule((1, {"paper": 1}))}
    config = load_config(tiny.write_recipe(tmp_path, mining=mining, batch=batch))
    section = config.mining_of("paper")
    assert (section.p, section.m, section.k, section.edges, section.partitioner) == (2, 10, 4, "mutual", "paper")
    assert config.mining_of("base") is config.mining
    assert (config.batch_plans, config.mined_plans) == (["paper"], ["paper"])
    config = load_config(tmp_path / "recipe.yaml", ["negatives.per_query=1"])
    assert config.mined_plans == ["base", "paper"], "hard negatives come from base"


def test_phases_in_steps_and_the_written_recipe(tmp_path: Path) -> None:
    config = load_config(tiny.write_recipe(tmp_path, **MIXED))
    assert config.phases() == [(3, {"base": 1.0}), (6, {"base": 0.6, "hard": 0.4})]
    assert config.mined_plans == ["base", "hard"]
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
    assert load_config(tiny.write_recipe(tmp_path)).phases() is None
