"""Recipes: every shipped one is valid, every mistake is one line with file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import yaml

from b3.config import Config, describe_keys, dump_config, load_config
from b3.config.load import merge
from b3.errors import ConfigError

pytestmark = pytest.mark.core

CONFIGS = sorted(f for f in (Path(__file__).parents[1] / "configs").rglob("*.yaml") if f.parent.name != "accelerate")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    config = load_config(path)
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        ("zzz=3", "unknown key 'zzz'; known keys: adapter"),
        ("data.datasets.0.famly=vqa", "did you mean 'data.datasets.0.family'?"),
        ("train.steps=many", "'train.steps' = 'many'"),
        ("train.lr=0", "greater than 0"),
        ("batch.policy=best", "'b3', 'b3_merged', 'b3_mixed', 'random' or 'random_mixed'"),
        ("mining.p={vqa: x}", "'mining.p'"),
        ("train.warmup_steps=99", "train.warmup_steps 99 exceeds train.steps 6"),
        ("data.datasets.5.p=1", "there is no element 5; the list has 2"),
        ("nonsense", "not of the form section.key=value"),
        ("train.steps={", "not valid YAML"),
        ("data.datasets.1.subset=pictures", "listed twice"),
        ("model={name: m, min_pixels: 2000, max_pixels: 1000}", "exceeds model.max_pixels"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.write_recipe(tmp_path), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_in_the_file_names_file_and_line(tmp_path: Path) -> None:
    file = tiny.write_recipe(tmp_path)
    lines = file.read_text().splitlines()
    line = next(i for i, text in enumerate(lines) if text.strip().startswith("lr:"))
    lines[line] = lines[line].replace("lr:", "learning_rate:")
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=rf"recipe\.yaml:{line + 1}: unknown key 'train.learning_rate'"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "must be a mapping"), ("", "mapping")]
)
def test_a_broken_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_a_recipe_can_start_from_another(tmp_path: Path) -> None:
    tiny.write_recipe(tmp_path, "base.yaml")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nbatch: {size: 24}\n")
    config = load_config(tmp_path / "child.yaml", ["train.lr=1e-3"])
    assert (config.batch.size, config.batch.policy, config.train.lr) == (24, "random", 1e-3)
    (tmp_path / "base.yaml").write_text("base: child.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "child.yaml")


def test_merge_replaces_lists_and_keeps_the_rest() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 0}


def test_help_names_every_section() -> None:
    text = describe_keys()
    assert all(f"  {key}" in text for key in ("train.steps", "mining.community_size", "eval.source"))


def test_rank_window_by_family(tmp_path: Path) -> None:
    config = load_config(tiny.write_recipe(tmp_path), ["mining.p={vqa: 70, retrieval: 30}", "data.datasets.1.p=5"])
    first, second = config.data.datasets
    assert (config.mining.p_of(first), config.mining.p_of(second)) == (30, 5)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_written_recipe_loads_again(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_a_key_that_changes_nothing_is_no_error() -> None:
    config = load_config("configs/demo.yaml", ["model.train=full", "train.save_merged=true"])
    assert config.model.train == "full"
    assert load_config("configs/demo.yaml", ["data.max_bad_images=5"]).data.max_bad_images == 5


def test_a_recipe_that_is_no_file_is_checked_too(tmp_path: Path) -> None:
    from b3.mining.recipe import mine_recipe
    from b3.train.debug import prepare
    from b3.train.run import train

    config = Config.model_validate(tiny.recipe(tmp_path, batch={"policy": "b3", "size": 10}))
    for entrance in (train, mine_recipe, prepare):
        with pytest.raises(ConfigError, match="is not a multiple of mining"):
            entrance(config)
