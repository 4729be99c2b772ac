"""A run on the hub: what arrives there loads with the same vectors, and its card states the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from integrations.close import TOLERANCE, distance
from integrations.hub_stand_in import StandIn

from b3 import Embedder
from b3.config import load_config
from b3.integrations.hub import main, results_of
from train import main as train

ROOT = Path(__file__).parents[2]
TEXTS = ["a red disc", "what is number 3 ?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with plans and merged weights, and an evaluation of it."""
    from b3.eval.run import EvalSpec, evaluate

    root = tmp_path_factory.mktemp("hub")
    tiny.write_data(root / "data", rows=48)
    tiny.write_text_model(root / "model")
    rng = np.random.default_rng(0)
    (root / "teacher").mkdir()
    for side in ("queries", "targets"):
        np.save(root / "teacher" / f"words_{side}.npy", rng.normal(size=(48, 8)).astype(np.float32))
    recipe = tiny.write_recipe(
        root, data={"datasets": [{"subset": "words"}]}, batch={"policy": "b3", "size": 8},
        train={"steps": 2, "save_merged": True}, mining={"p": 1, "m": 8},
    )  # fmt: skip
    from b3.mining.recipe import mine_recipe

    mine_recipe(load_config(recipe))
    assert train([str(recipe)]) == 0
    spec = EvalSpec(str(root / "run" / "merged"), f"parquet:{root / 'data'}")
    evaluate(spec, ["words"], root / "eval")
    return root / "run"


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with StandIn("a-token") as stand_in:
        yield stand_in


def push(hub: StandIn, *arguments: str, token: str = "a-token") -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its surroundings once."""
    changes = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "b3.integrations.hub", *arguments]
    return subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, timeout=120)


def fetched(hub: StandIn, folder: Path) -> Path:
    for name, content in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_run_arrives_whole(run: Path, hub: StandIn, tmp_path: Path) -> None:
    done = push(hub, str(run), "--repo", "me/words", "--merged", "--eval", str(run.parent / "eval"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/words (private)\n"
    assert hub.repositories["me/words"]["visibility"] == "private" and hub.summary == "run, from b3"
    folder = fetched(hub, tmp_path / "fetched")
    vectors = Embedder.from_pretrained(folder, dtype="float32").encode(TEXTS)
    assert distance(vectors, Embedder.from_pretrained(run / "merged", dtype="float32").encode(TEXTS)) < TOLERANCE
    for name in ("communities.npy", "manifest.json", "report.html"):
        assert (folder / "plans" / "words" / name).read_bytes() == (run.parent / "mining" / "words" / name).read_bytes()
    assert (folder / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert not [name for name in hub.files if "checkpoint" in name or "adapter" in name or name.startswith(".")]
    assert "evaluation/eval/words_score.json" in hub.files


def test_the_card_states_the_results(run: Path, hub: StandIn, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    assert push(hub, str(run), "--repo", "me/words", "--merged", "--eval", str(run.parent / "eval")).returncode == 0
    card = ModelCard(hub.files["README.md"].decode())
    scores = json.loads((run.parent / "eval" / "summary.json").read_text())
    results = {result.dataset_config: result for result in card.data.eval_results}
    assert results["words"].metric_value == round(100 * scores["subsets"]["words"], 2)
    assert results[None].metric_value == round(100 * scores["mean"], 2)
    assert results["words"].metric_type == "precision@1" and results["words"].dataset_split == "test"
    assert card.data.model_name == "words" and "base_model" not in card.data.to_dict()
    assert 'Embedder.from_pretrained("me/words' in card.text and str(run) not in card.text.split("## Recipe")[0]


def test_an_adapter_on_a_local_base_stays_here(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--repo", "me/words"]) == 2
    assert "which others do not have; export it" in capsys.readouterr().err


def test_what_cannot_be_pushed_is_one_line(run: Path, hub: StandIn, tmp_path: Path) -> None:
    done = push(hub, str(run), "--repo", "me/words", "--merged", token="wrong")
    assert done.returncode == 2 and not hub.files
    assert "the hub did not take me/words (" in done.stderr and done.stderr.count("\n") == 1
    for arguments, message in (
        ([str(tmp_path), "--repo", "me/x"], "holds no weights"),
        ([str(run), "--repo", "words"], "not of the form OWNER/NAME"),
        ([str(run), "--repo", "me/x", "--merged", "--eval", str(tmp_path)], "holds no summary.json"),
    ):
        failed = push(hub, *arguments)
        assert failed.returncode == 2 and message in failed.stderr and not hub.asked[2:]


def test_results_name_metric_and_data(run: Path) -> None:
    mean, words = results_of(run.parent / "eval")
    assert mean.dataset_config is None and words.dataset_type.startswith("parquet:")
