"""On a file system over a network, ranks on other machines see new files late: nothing hangs, fails or differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from forks import Job
from surroundings import Late


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("late")
    tiny.write_data(folder / "data", rows=24)
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder, data={"datasets": [{"subset": "words"}]}, mining={"teacher": str(folder / "model")})
    return folder


def run(root: Path, program: str, *arguments: str) -> None:
    since = (root / "recipe.yaml").stat().st_ctime  # the last of what the ranks are given
    job = Job(root / "logs", *arguments, ranks=2, program=program, prepare=Late(str(root), since=since))
    assert job.wait() == [0, 0], [job.text(rank) for rank in range(2)]


def test_mining_waits_for_plans_of_other_ranks(root: Path) -> None:
    run(root, "scripts.mine", str(root / "recipe.yaml"))
    assert (root / "mining" / "words" / "manifest.json").exists()


def test_ranks_agree_on_what_is_scored(root: Path) -> None:
    """The second start follows at once: rank 1 does not see the score that rank 0 sees."""
    data = ["--dataset_name", str(root / "data"), "--image_dir", str(root / "data" / "images.parquet")]
    out = root / "out"
    command = ["--model_name", str(root / "model"), *data, "--encode_output_path", str(out)]
    for subsets in (["words"], ["words", "pictures"]):
        run(root, "eval_mmeb", *command, "--subset_name", *subsets)
        assert [*json.loads((out / "summary.json").read_text())["subsets"]] == subsets


def test_ranks_agree_that_a_run_is_complete(root: Path) -> None:
    command = [str(root / "recipe.yaml"), "train.schedule=constant"]
    run(root, "train", *command, "train.steps=1")
    (root / "run" / ".removed-checkpoint-0").mkdir()  # its deletion did not reach the disk
    run(root, "train", *command, "train.steps=1")
    assert (root / "run" / "result.json").exists() and not (root / "run" / ".removed-checkpoint-0").exists()
    run(root, "train", *command, "train.steps=2")  # rank 1 does not see all of the checkpoint yet
    run(root, "train", *command, "train.steps=3")
