"""Two nodes, simulated by two agents of torchrun: the bytes of one node, and an end when one of them is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import tiny
from forks import Job
from nodes import Nodes
from processes import end

START_UP, SECONDS = 600.0, 120.0

PROGRAM = "import sys\nfrom b3 import distributed\nfrom rank_programs import commands\n"
PROGRAM += "distributed.leave(commands(sys.argv[1:]))\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    teacher = str(folder / "model")
    tiny.write_recipe(folder, mining={"teacher": teacher}, batch={"policy": "b3"}, train={"steps": 3})
    (folder / "program.py").write_text(PROGRAM)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """What the three commands computed: plans, weights, scores and vectors."""
    patterns = ("mining/*/*.npy", "run/*.safetensors", "run/checkpoint-*/*.safetensors", "eval/*_score.json")
    files = [file for pattern in (*patterns, "eval/*_pred.txt") for file in folder.glob(pattern)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_nodes_give_the_bytes_of_one(root: Path) -> None:
    out = root / "out-2"
    with Nodes(root / "logs-2", root / "program.py", root, out) as started:
        codes = [started.wait(node, START_UP) for node in range(2)]
        assert codes == [0, 0], started.text()
    job = Job(root / "logs-1", str(root), str(root / "out-1"), ranks=2, program="rank_programs:commands")
    assert job.wait(START_UP) == [0, 0], job.text()
    results = [digests(root / "out-1"), digests(out)]
    assert results[0] == results[1]
    kinds = {name.partition("/")[0] for name in results[0]}
    assert kinds == {"mining", "run", "eval"} and len(results[0]) >= 10


@pytest.mark.parametrize("lost", [0, 1])
def test_losing_a_node_ends_the_other_by_name(root: Path, lost: int) -> None:
    out = root / f"lost-{lost}"
    recipe = (root / "recipe.yaml", f"output_dir={out}", "batch.policy=random", "train.steps=20000")
    with Nodes(root / f"logs-lost-{lost}", "train.py", *recipe) as started:
        metrics = out / "metrics.jsonl"
        assert started.when(lambda: metrics.exists() and len(metrics.read_text()) > 0, START_UP), started.text()
        started.kill(lost)
        assert started.wait(1 - lost, SECONDS) != 0, started.text()
        assert not end(started.marks[1 - lost], grace=30.0), "workers of a rank have outlived it"
    text = started.logs[1 - lost].read_text()
    assert f"[rank {1 - lost}] error: rank {lost} has ended without a message (it was killed" in text, text
