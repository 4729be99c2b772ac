"""Test processes share two cores and never look at the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

# About a third of the test files, and single cases, bear the mark `core`: golden values of the reference, numbers that
# must not depend on ranks or chunks, what a killed run leaves, and the floors. `make test-core` runs these.
CORE = {
    "eval/test_eval_mmeb", "eval/test_toy_benchmark", "mining/test_brute_force", "mining/test_rank",
    "mining/test_toy_miner", "model/test_adapter", "model/test_embedder", "model/test_forwards", "model/test_numerics",
    "model/test_qwen2_vl_images", "model/test_settings", "test_config", "test_encode", "test_imports",
    "test_same_numbers", "train/test_gradcache", "train/test_objective", "train/test_ranks", "train/test_run",
    "train/test_sampler", "train/test_step_properties", "train/test_toy_loss",
}  # fmt: skip
CORE_CASES = {
    "test_sigkill_at_random_moments_changes_nothing[1 rank-0]",
    "test_a_signal_to_one_rank_stops_all_with_a_checkpoint[1 rank-15]",  # SIGTERM
    "test_a_rank_that_dies_ends_the_others_by_name",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(tests).with_suffix("").as_posix()
        if file in CORE or item.name in CORE_CASES:
            item.add_marker("core")
