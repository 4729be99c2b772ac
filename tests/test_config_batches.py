"""What a recipe may say about batches: every contradiction is one line that names the key and the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from b3.config import load_config
from b3.errors import ConfigError


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"policy": "b3_merged"}, "merges data sets of family classification, and the recipe has 0"),
        ({"remix": "frozen"}, "unknown key 'batch.remix'"),
        ({"policy": "b3", "random_steps": 7}, "batch.random_steps 7 exceeds train.steps 6"),
        ({"schedule": []}, "unknown key 'batch.schedule'"),
        ({"policy": "b3_mixed", "size": 10}, "not a multiple of mining.k 4; use 8 or 12"),
    ],
)
def test_a_batch_that_cannot_be(tmp_path: Path, batch: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.write_recipe(tmp_path, batch=batch))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", ["0", "-1", ".inf", ".nan"])
def test_a_weight_is_a_positive_number(tmp_path: Path, weight: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.datasets\.0\.weight"):
        load_config(tiny.write_recipe(tmp_path), [f"data.datasets.0.weight={weight}"])
