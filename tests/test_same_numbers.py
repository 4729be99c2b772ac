"""Plans, batches and losses are those recorded in same_numbers.json: what is computed does not change unnoticed.

Arrays are compared by hash. Losses are equal bit by bit on the kind of machine that recorded them, elsewhere within
1e-5. After a change that is meant to alter numbers, record them anew and say why in the commit:

    python tests/test_same_numbers.py
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import conftest  # noqa: F401  one thread, no network: before torch is imported

import numpy as np
import pytest
import tiny

from b3.config import Config, load_config
from b3.data.datasets import load_datasets
from b3.mining import BatchPlan, mine
from b3.mining.recipe import mine_recipe
from b3.train.build import load_plans
from b3.train.run import train
from b3.train.sampler import build_sampler

pytestmark = pytest.mark.core

FIXTURE = Path(__file__).with_name("same_numbers.json")
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "anneal": {},
    "mutual": {"edges": "mutual"},
    "kmeans": {"partitioner": "kmeans"},
}
SUBSETS = {"emoji_vqa": "vqa", "emoji_vg": "grounding"}
POLICIES = ("b3", "b3_mixed", "random")
STEPS = 10


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()


def facts(plan: BatchPlan) -> dict[str, Any]:
    """Shape and hash of each array of a plan."""
    arrays = {name: getattr(plan, name) for name in ("communities", "remainder", "hard_negatives")}
    return {name: [list(array.shape), digest(array)] for name, array in arrays.items()}


def mined(variant: str) -> dict[str, Any]:
    """Of the plan of 2,000 made-up rows in clusters."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(40, 32))
    queries = (centres[rng.integers(0, 40, 2000)] + 0.6 * rng.normal(size=(2000, 32))).astype(np.float32)
    targets = (queries + 0.5 * rng.normal(size=(2000, 32))).astype(np.float32)
    targets[:100] = targets[100:200]  # some are equal
    options = VARIANTS[variant]
    return facts(mine(queries, targets, p=10, m=50, community_size=16, hard_negatives=2, seed=3, **options))


def demo(mining: Path, *overrides: str) -> Config:
    """The demo's recipe over two of its data sets."""
    entries = ", ".join(f"{{subset: {name}, family: {family}}}" for name, family in SUBSETS.items())
    return load_config(
        DEMO, [f"data.datasets=[{entries}]", f"mining.dir={mining}", "negatives.per_query=2", *overrides]
    )


def batches(mining: Path, policy: str) -> list[str]:
    """Hash of each step's batch: rows numbered through all data sets in the order of the recipe."""
    config = demo(mining, f"batch.policy={policy}", f"train.steps={STEPS}", "train.warmup_steps=0")
    datasets = load_datasets(config)
    sampler = build_sampler(config, datasets, load_plans(config, datasets))
    first = np.cumsum([0, *map(len, datasets)])
    return [digest(np.array([first[dataset] + row for dataset, row in batch])) for batch in sampler]


def losses(root: Path) -> list[dict[str, float]]:
    """Of three steps of a tiny model with images, texts and dropout."""
    tiny.write_data(root / "data", rows=48)
    tiny.write_model(root / "model")
    changes = {"adapter": {"dropout": 0.1, "use_dora": True}, "train": {"steps": 3, "save_every": 3, "log_every": 1}}
    train(Config.model_validate(tiny.recipe(root, **changes)))
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("loss", "grad_norm")} for line in lines]


def machine() -> dict[str, Any]:
    """What floating point numbers may depend on."""
    import torch

    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(scope="module")
def recorded() -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(FIXTURE.read_text())
    return content


@pytest.fixture(scope="module")
def mining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "mining"
    mine_recipe(demo(folder))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_plans_of_arrays_are_the_recorded_ones(recorded: Mapping[str, Any], variant: str) -> None:
    assert mined(variant) == recorded["mined"][variant]


@pytest.mark.parametrize("subset", SUBSETS)
def test_plans_of_embedded_data_are_the_recorded_ones(recorded: Mapping[str, Any], mining: Path, subset: str) -> None:
    assert facts(BatchPlan.load(mining / subset)) == recorded["plans"][subset]


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_are_the_recorded_ones(recorded: Mapping[str, Any], mining: Path, policy: str) -> None:
    assert batches(mining, policy) == recorded["batches"][policy]


def test_losses_are_the_recorded_ones(recorded: Mapping[str, Any], tmp_path: Path) -> None:
    found, expected = losses(tmp_path), recorded["losses"]
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == (theirs if machine() == recorded["machine"] else pytest.approx(theirs, rel=1e-5))


def record() -> None:
    """Write the fixture."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mine_recipe(demo(root / "mining"))
        content = {
            "machine": machine(),
            "mined": {variant: mined(variant) for variant in VARIANTS},
            "plans": {subset: facts(BatchPlan.load(root / "mining" / subset)) for subset in SUBSETS},
            "batches": {policy: batches(root / "mining", policy) for policy in POLICIES},
            "losses": losses(root / "run"),
        }
    FIXTURE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    record()
