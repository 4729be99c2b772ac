"""A miner from outside the package: one file, one line in the registry, used through a recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from mining import reference

from b3 import registry
from b3.config import load_config
from b3.errors import ConfigError
from b3.mining.recipe import mine_recipe

TOY = '''
import numpy as np

def cut(problem, options, clock):
    """Neighbouring rows share a community."""
    count, size = len(problem), options.community_size
    with clock.stage("toy"):
        community_of = np.arange(count) // size
        community_of[count // size * size :] = -1
    problem.facts["toy_edges"] = problem.graph.num_edges
    return community_of
'''


def test_a_miner_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_data(tmp_path / "data")
    tiny.write_recipe(tmp_path)
    (tmp_path / "teacher").mkdir()
    for subset in ("pictures", "words"):
        for side, array in zip(("queries", "targets"), reference.clustered(96), strict=True):
            np.save(tmp_path / "teacher" / f"{subset}_{side}.npy", array)
    overrides = ["mining.partitioner=toy", "mining.k=10", "batch.size=10"]
    with pytest.raises(ConfigError, match="no miner 'toy'; choose from anneal, kmeans, paper, random"):
        load_config(tmp_path / "recipe.yaml", overrides)

    (tmp_path / "toy_miner.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.MINERS, "toy", "toy_miner:cut")
    plan = mine_recipe(load_config(tmp_path / "recipe.yaml", overrides))["words"]
    assert np.array_equal(plan.communities, np.arange(90).reshape(9, 10))
    assert plan.remainder.tolist() == [90, 91, 92, 93, 94, 95]
    assert plan.manifest["partitioner"] == "toy" and plan.report["toy_edges"] > 0 and "toy" in plan.report["seconds"]
