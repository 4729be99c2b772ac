"""Mining from a recipe and from the command line, and training on what was mined."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from forks import Job
from processes import run_python

import train
from b3.config import load_config
from b3.data.datasets import load_datasets
from b3.errors import InputError
from b3.mining import BatchPlan, recipe
from b3.mining.recipe import load_plan, mine_recipe
from b3.mining.teacher import CACHE
from scripts import mine as script


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_data(tmp_path / "data")
    tiny.write_recipe(tmp_path, negatives={"per_query": 2})
    rng = np.random.default_rng(0)
    (tmp_path / "teacher").mkdir()
    for subset in ("pictures", "words"):
        centres = rng.normal(size=(96, 16)) + 2 * rng.normal(size=(8, 16))[rng.integers(8, size=96)]
        for side in ("queries", "targets"):
            array = centres + 0.3 * rng.normal(size=(96, 16))
            np.save(tmp_path / "teacher" / f"{subset}_{side}.npy", array.astype(np.float16))
    return tmp_path


def test_a_recipe_is_mined_once(root: Path) -> None:
    config = load_config(root / "recipe.yaml")
    plans = mine_recipe(config)
    assert set(plans) == {"pictures", "words"}
    for plan in plans.values():
        assert plan.communities.shape == (24, 4)
        assert plan.hard_negatives is not None and plan.hard_negatives.shape == (96, 2)
        assert plan.report["mined_negatives_per_query"] > plan.report["random_mined_negatives_per_query"]
    page = (root / "mining" / "report.html").read_text()
    assert "pictures" in page and "data:image/png;base64" in page
    stamp = (root / "mining" / "words" / "manifest.json").stat().st_mtime_ns
    again = mine_recipe(config)
    assert np.array_equal(again["words"].communities, plans["words"].communities)
    assert (root / "mining" / "words" / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mining.p=3", "p was 2, now 3"),
        ("mining.k=6", "community_size was 4, now 6"),
        ("negatives.per_query=3", "hard_negatives was 2, now 3"),
        ("mining.seed=1", "seed was 0, now 1"),
        ("data.datasets.0.max_rows=50", "data_fingerprint was"),
    ],
)
def test_a_plan_of_other_parameters_or_data_is_refused(root: Path, override: str, message: str) -> None:
    mine_recipe(load_config(root / "recipe.yaml"))
    config = load_config(root / "recipe.yaml", [override])
    with pytest.raises(InputError, match=message):
        load_plan(config, config.data.datasets[0], load_datasets(config)[0])


def test_one_plan_serves_many_training_seeds(root: Path) -> None:
    mine_recipe(load_config(root / "recipe.yaml"))
    config = load_config(root / "recipe.yaml", ["seed=7"])
    assert load_plan(config, config.data.datasets[0], load_datasets(config)[0]).manifest["seed"] == 0


def test_fewer_hard_negatives_than_mined_are_fine(root: Path) -> None:
    mine_recipe(load_config(root / "recipe.yaml"))
    config = load_config(root / "recipe.yaml", ["negatives.per_query=1"])
    assert load_plan(config, config.data.datasets[0], load_datasets(config)[0]).hard_negatives is not None


def test_training_on_mined_batches_with_hard_negatives(root: Path) -> None:
    tiny.write_model(root / "model")
    assert script.main([str(root / "recipe.yaml")]) == 0
    assert train.main([str(root / "recipe.yaml"), "batch.policy=b3", "train.steps=3"]) == 0
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "mined negatives" in (root / "run" / "README.md").read_text()


def test_a_checkpoint_can_be_the_teacher(root: Path) -> None:
    tiny.write_model(root / "model")
    config = load_config(root / "recipe.yaml", [f"mining.teacher={root / 'model'}"])
    assert mine_recipe(config)["pictures"].manifest["teacher"] == str(root / "model")


def test_what_a_killed_call_kept_of_its_teacher_is_deleted(root: Path) -> None:
    """Killed after the last plan: nothing is left to mine, and the next call still cleans up."""
    config = load_config(root / "recipe.yaml")
    mine_recipe(config)
    kept = Path(config.mining.dir) / CACHE / "some"
    kept.mkdir(parents=True)
    (kept / "shard.safetensors").write_bytes(b"")
    mine_recipe(config)
    assert not kept.parent.exists()


def test_large_vectors_of_a_teacher_are_mapped_from_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_text_model(root / "text")
    overrides = ["mining.teacher=" + str(root / "text"), "data.datasets=[{subset: words}]"]
    plans, kinds = [], list[type]()
    mined = recipe.mine

    def mine(queries: np.ndarray, targets: np.ndarray, **options: Any) -> BatchPlan:
        kinds.extend((type(queries), type(targets)))
        return mined(queries, targets, **options)

    monkeypatch.setattr(recipe, "mine", mine)
    for kept in (1 << 30, 0):
        monkeypatch.setattr(recipe, "KEPT_BYTES", kept)
        plans.append(mine_recipe(load_config(root / "recipe.yaml", [*overrides, f"mining.dir={root}/plans-{kept}"])))
    assert kinds == [np.ndarray] * 2 + [np.memmap] * 2
    assert np.array_equal(plans[0]["words"].communities, plans[1]["words"].communities)
    assert not list((root / "plans-0").glob(".*.stages"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("absent", "does not exist; write the teacher's embeddings"),
        ("short", "have 95 rows, the data set 96"),
        ("torn", "is not an .npy file of numbers; write the teacher's embeddings with numpy.save"),
        ("integers", "expected floats of shape"),
        ("nan", "row 5"),
    ],
)
def test_teacher_arrays_that_cannot_be_used_are_named(root: Path, change: str, message: str) -> None:
    file = root / "teacher" / "pictures_targets.npy"
    array = np.load(file)
    if change == "absent":
        file.unlink()
    elif change == "short":
        np.save(file, array[:-1])
    elif change == "torn":
        file.write_bytes(file.read_bytes()[:50])
    elif change == "integers":
        np.save(file, array.astype(int))
    else:
        array[5, 0] = np.nan
        np.save(file, array)
    with pytest.raises(InputError, match=message):
        mine_recipe(load_config(root / "recipe.yaml"))


def test_two_arrays_from_the_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = root / "teacher"
    arrays = ["--queries", str(teacher / "words_queries.npy"), "--targets", str(teacher / "words_targets.npy")]
    options = "-p 2 -m 10 -k 4 --hard-negatives 3 --seed 1 --out"
    command = [*arrays, *options.split(), str(root / "x")]
    assert script.main(command) == 0
    assert "24 communities of 4" in capsys.readouterr().out
    plan = BatchPlan.load(root / "x")
    assert plan.hard_negatives is not None and plan.hard_negatives.shape == (96, 3)
    (root / ".x.stages").mkdir()  # left by a kill after the plan was written
    assert script.main(command) == 0
    assert "holds this batch plan already; nothing to do" in capsys.readouterr().out
    assert not (root / ".x.stages").exists()
    assert script.main([*command, "--seed", "2"]) == 2
    assert "holds another batch plan (seed was 1, now 2); choose another --out" in capsys.readouterr().err
    assert script.main(arrays) == 2
    assert "missing: --out" in capsys.readouterr().err


def plan_files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.npy"))}


def test_stages_beside_a_finished_plan_are_deleted(root: Path) -> None:
    """A call was killed between the two, or a power failure undid the deletion."""
    config = load_config(root / "recipe.yaml")
    mine_recipe(config)
    left = root / "mining" / ".pictures.stages" / "rankings.npz"
    left.parent.mkdir()
    left.write_bytes(b"half")
    before = plan_files(root / "mining")
    mine_recipe(config)
    assert not left.parent.exists() and plan_files(root / "mining") == before


def test_one_two_and_three_ranks_give_the_same_bytes(root: Path) -> None:
    tiny.write_model(root / "teacher-model")
    teacher = f"mining.teacher={root / 'teacher-model'}"
    found = []
    for ranks in (1, 2, 3):
        arguments = [str(root / "recipe.yaml"), f"mining.dir={root / f'mining-{ranks}'}", teacher]
        if ranks == 2:  # as from a shell
            said = run_python("scripts/mine.py", *arguments, ranks=2, timeout=300).stdout
        else:
            job = Job(root / f"logs-{ranks}", *arguments, ranks=ranks, program="scripts.mine")
            assert job.wait(300) == [0] * ranks, job.text()
            said = "".join(map(job.text, range(ranks)))
        assert said.count("mined negatives per query") == 2, "one rank prints"
        found.append(plan_files(root / f"mining-{ranks}"))
        assert (root / f"mining-{ranks}" / "report.html").exists()
        assert not list((root / f"mining-{ranks}").glob(".*")), "stages are removed when the plan is saved"
    assert len(found[0]) == 6 and found[0] == found[1] == found[2]


def test_an_interrupted_recipe_continues_after_the_ranking(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(root / "recipe.yaml")
    mining = sys.modules["b3.mining.mine"]
    original = mining.find_communities
    monkeypatch.setattr(mining, "find_communities", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mine_recipe(config)
    assert (root / "mining" / ".pictures.stages" / "rankings.npz").exists()
    monkeypatch.setattr(mining, "find_communities", original)
    ranked: list[int] = []
    rank_targets = mining.rank_targets
    monkeypatch.setattr(mining, "rank_targets", lambda *a, **k: ranked.append(1) or rank_targets(*a, **k))
    mine_recipe(config)
    assert len(ranked) == 1, "only the second data set"
    assert not (root / "mining" / ".pictures.stages").exists()
