"""Every recipe that is delivered runs in its debug form: no mistake is left in it but paths and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Job

from b3.config import Config, load_config
from b3.config.checks import check
from b3.train.debug import debug_config, stand_in

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "accelerate" not in p.parts)
DRAWN = ("demo", "b3pp_qwen2vl_2b", "text_nli_roberta_b3_negative")  # of all others, figures are not drawn


def form_of(config: Config) -> str:
    """What decides a debug run, names and places aside: recipes that differ in what is replaced have it in common."""
    small = debug_config(config)
    text = json.dumps(small.model_dump(mode="json") | {"name": ""}, sort_keys=True)
    return stand_in(config).__name__ + text.replace(small.output_dir, "OUT")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The folder of a recipe's debug run, one run for all recipes of a form."""
    folders: dict[str, Path] = {}

    def run(recipe: Path) -> Path:
        config = load_config(recipe)
        check(config)
        form = form_of(config)
        if form not in folders:
            place = folders[form] = tmp_path_factory.mktemp("debug")
            job = Job(place / "logs", str(recipe), f"output_dir={place / 'run'}", "--debug", draws=recipe.stem in DRAWN)
            assert job.wait() == [0], job.text()
        return folders[form]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(ROOT / "configs").with_suffix("").as_posix())
def test_every_recipe_runs_in_its_debug_form(recipe: Path, runs: Callable[[Path], Path]) -> None:
    """On a CPU and without network (HF_HUB_OFFLINE is set for all tests, and no recipe's data is here)."""
    place = runs(recipe)
    folder = place / "run-debug"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert (folder / "result.json").exists() and (folder / "report.html").exists()
    assert not (place / "run").exists()


def test_two_ranks_and_again(tmp_path: Path) -> None:
    """A debug run starts anew each time, whatever the last one left."""
    recipe = str(ROOT / "configs" / "b3pp_qwen2vl_2b.yaml")
    for ranks in (2, 1):
        job = Job(tmp_path / "logs", recipe, f"output_dir={tmp_path / 'run'}", "--debug", ranks=ranks)
        assert job.wait() == [0] * ranks, job.text()
        assert json.loads((tmp_path / "run-debug" / "environment.json").read_text())["world_size"] == ranks


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run-debug").mkdir()
    (tmp_path / "run-debug" / "mine.txt").write_text("mine")
    job = Job(tmp_path / "logs", str(ROOT / "configs" / "demo.yaml"), f"output_dir={tmp_path / 'run'}", "--debug")
    assert job.wait() == [2]
    assert "not of a debug run" in job.text()
    assert (tmp_path / "run-debug" / "mine.txt").read_text() == "mine"


def test_what_a_recipe_is_about_stays() -> None:
    config = load_config(ROOT / "configs" / "b3pp_qwen2vl_2b.yaml")
    small = debug_config(config, ranks=3)
    assert small.batch.size % small.mining.community_size == 0 and small.batch.size % 3 == 0
    assert {d.family for d in small.data.datasets} == {d.family for d in config.data.datasets}
    for kept in ("adapter", "negatives"):
        assert getattr(small, kept) == getattr(config, kept)
    for key in ("edges", "veto", "partitioner", "refine_passes"):
        assert getattr(small.mining, key) == getattr(config.mining, key)
    for key in ("lr", "schedule", "temperature", "max_grad_norm"):
        assert getattr(small.train, key) == getattr(config.train, key)
    assert small.batch.policy == config.batch.policy


def test_precision_kernels_and_workers_stay_where_a_gpu_is() -> None:
    config = load_config(ROOT / "configs" / "b3_qwen2vl_2b.yaml", ["model.attention=varlen", "train.workers=3"])
    on_gpu, elsewhere = debug_config(config, on_gpu=True), debug_config(config)
    for section, key, without in (
        ("model", "dtype", "float32"),
        ("model", "attention", "auto"),
        ("train", "bf16", False),
        ("train", "workers", 0),
    ):
        assert getattr(getattr(on_gpu, section), key) == getattr(getattr(config, section), key) != without
        assert getattr(getattr(elsewhere, section), key) == without
