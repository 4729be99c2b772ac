"""A run with the loss's options: a learned temperature is trained, saved and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from forks import Job
from safetensors.torch import load_file

from b3.config import load_config
from b3.errors import ConfigError


def start(root: Path, run: str, *overrides: str, recipe: str = "recipe.yaml") -> tuple[int, str]:
    """(exit code, what was printed) of one run."""
    job = Job(root / "logs" / run, str(root / recipe), f"output_dir={root / run}", *overrides)
    (code,) = job.wait()
    return 99 if code is None else code, job.text()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


def test_a_learned_temperature_survives_a_restart(root: Path) -> None:
    options = [
        "train.learn_temperature=true",
        "train.symmetric=true",
        "train.mask_margin=0.1",
        "train.temperature=0.05",
        "train.steps=4",
    ]
    code, text = start(root, "whole", *options)
    assert code == 0, text
    learned = load_file(root / "whole" / "checkpoint-4" / "loss.safetensors")["log_scale"]
    assert 0 < abs(float(learned) - 2.9957) < 1
    torn = root / "torn"
    shutil.copytree(root / "whole", torn)
    for name in ("result.json", "checkpoint-4/complete.json"):
        (torn / name).unlink()
    text = (torn / "config.yaml").read_text()
    (torn / "config.yaml").write_text(text.replace(str(root / "whole"), str(torn)))
    code, text = start(root, "torn", *options)
    assert code == 0, text
    assert tiny.without_times(metrics(torn)) == tiny.without_times(metrics(root / "whole"))
    assert (load_file(torn / "checkpoint-4" / "loss.safetensors")["log_scale"] == learned).all()


def test_weight_decay_spares_a_learned_temperature(root: Path) -> None:
    options = ["train.learn_temperature=true", "train.temperature=0.05", "train.lr=1e-9", "train.weight_decay=1e6"]
    code, text = start(root, "decayed", *options, "train.steps=4")
    assert code == 0, text
    folder = root / "decayed" / "checkpoint-4"
    assert float(load_file(folder / "loss.safetensors")["log_scale"]) == pytest.approx(np.log(20), abs=1e-6)
    largest = [max(abs(v).max() for v in load_file(root / f / "adapter_model.safetensors").values())
               for f in (folder, root / "whole")]  # fmt: skip
    assert largest[0] < 0.999 * largest[1], "the adapter does decay"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learn_temperature=true", "train.temperature=0.005"], "below 0.01"),
        (["train.mask_margin=-0.1"], "train.mask_margin"),
        (["model.train=full", "model.init_adapter=x"], "init_adapter would not be loaded"),
        (["train.share_duplicates=sometimes"], "train.share_duplicates"),
    ],
)
def test_options_that_cannot_be_meant(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(root / "recipe.yaml", overrides)


def test_a_teachers_scores_mask_negatives(root: Path) -> None:
    options = ["train.steps=2", "train.mask_teacher_margin=0"]
    code, text = start(root, "missing", *options)
    assert code == 2 and "mining.teacher" in text.splitlines()[-1] and "Traceback" not in text
    (root / "teacher").mkdir()
    for seed, side in enumerate(("queries", "targets")):  # unrelated: about half of all targets outscore the positive
        for subset in ("pictures", "words"):
            np.save(root / "teacher" / f"{subset}_{side}.npy", np.random.default_rng(seed).normal(size=(96, 4)))
    for run, given in (("guided", options), ("plain", options[:1])):
        code, text = start(root, run, *given)
        assert code == 0, text
    assert metrics(root / "guided")[0]["loss"] < metrics(root / "plain")[0]["loss"]


def test_all_weights_but_the_frozen_are_trained_saved_and_resumed(root: Path) -> None:
    recipe = tiny.recipe(root, model={"train": "full", "freeze": [r"\.visual\."]}, train={"steps": 4, "lr": 1e-3})
    del recipe["adapter"]
    (root / "full.yaml").write_text(yaml.safe_dump(recipe))

    def run() -> None:
        code, text = start(root, "full", recipe="full.yaml")
        assert code == 0, text

    run()
    base, whole = (load_file(folder / "model.safetensors") for folder in (root / "model", root / "full"))
    assert whole.keys() == base.keys()
    assert all(bool((whole[n] == base[n]).all()) == ("visual" in n) for n in base)
    lines = metrics(root / "full")
    for name in ("result.json", "checkpoint-4/complete.json"):
        (root / "full" / name).unlink()
    run()
    assert tiny.without_times(metrics(root / "full")) == tiny.without_times(lines)
    again = load_file(root / "full" / "model.safetensors")
    assert all((again[n] == whole[n]).all() for n in whole)
