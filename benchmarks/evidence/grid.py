"""From a grid file to runs: each a recipe of `train.py` with overrides, a seed, and what it is called in a table."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from b3.config import Config

HERE = Path(__file__).parent
ROOT = "runs/evidence"  # below which recipes and grids expect what is made; another root takes its place


@dataclass(frozen=True)
class Run:
    """One run.

    recipe: file of the base recipe. overrides: as on the command line of `train.py`. labels: value of each axis.
    seed: of batches, mining, dropout and new weights. root: below which everything is written.
    """

    recipe: str
    overrides: tuple[str, ...]
    labels: tuple[tuple[str, Any], ...]
    seed: int
    root: str

    def _load(self, *more: str) -> Config:
        from b3.config import load_config

        file = HERE.parents[1] / self.recipe
        moved = [o.replace(ROOT, self.root) for o in [*_places(yaml.safe_load(file.read_text())), *self.overrides]]
        return load_config(file, [*moved, f"seed={self.seed}", f"mining.seed={self.seed}", *more])

    @property
    def key(self) -> str:
        """12 hexadecimal digits of what decides the result; runs of several questions that are equal have one."""
        tree = self._load().model_dump(mode="json", exclude_unset=True)
        for section, name in ((tree, "name"), (tree, "output_dir"), (tree["mining"], "dir")):
            section.pop(name)
        # As when the runs were recorded: mining had no seed of its own, and community_size was called k.
        tree["mining"].pop("seed")
        if "community_size" in tree["mining"]:
            tree["mining"]["k"] = tree["mining"].pop("community_size")
        return _digest(tree)

    @property
    def plan_key(self) -> str | None:
        """Digest of what decides the mined plans, None if the run reads none."""
        config = self._load()
        if not config.needs_plan:
            return None
        wanted = {"mining", "data", "negatives"}
        tree = config.model_dump(mode="json", include=wanted, exclude_unset=True)
        tree["mining"].pop("dir")
        tree.get("negatives", {}).pop("after_random", None)  # when they are used is no matter of mining
        return _digest(tree)

    def config(self) -> Config:
        """The recipe with its folders."""
        plans = self.plan_key or "none"
        return self._load(f"output_dir={self.root}/runs/{self.key}", f"mining.dir={self.root}/plans/{plans}")


def _places(tree: Any, prefix: str = "") -> list[str]:
    """Overrides that say again what a recipe says of paths below `ROOT`."""
    if isinstance(tree, dict):
        return [o for key, value in tree.items() for o in _places(value, f"{prefix}.{key}" if prefix else str(key))]
    return [f"{prefix}={tree}"] if isinstance(tree, str) and ROOT in tree else []


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def read_grid(file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(file.read_text())
    return tree


def expand(grid: dict[str, Any], root: str) -> dict[str, list[Run]]:
    """Runs by question.

    A question has `parts`, each a value or a list of values by axis, whose product is taken, and `fixed`, values for
    all parts; what neither says is in `defaults`. An axis is a table of overrides by value, or a list of templates for
    all values with ``{}`` in them. With `examples` the axis `size` also sets steps and warm-up, so that all sizes see
    as many pairs, and the learning rate: `lr_at_64` times (size / 64) ** `lr_power`.
    """
    return {name: _question(grid, question, root) for name, question in grid["questions"].items()}


def _question(grid: dict[str, Any], question: dict[str, Any], root: str) -> list[Run]:
    setting = {**grid["defaults"], **question.get("fixed", {})}
    runs: list[Run] = []
    for part in question["parts"]:
        names = list(part)
        for values in itertools.product(*(v if isinstance(v, list) else [v] for v in part.values())):
            chosen = {**setting, **dict(zip(names, values, strict=True))}
            overrides = [o for axis, value in chosen.items() for o in _overrides(grid, axis, value)]
            overrides += _scale(chosen)
            labels = tuple((axis, chosen[axis]) for axis in chosen)
            seeds = range(question.get("seeds", grid.get("seeds", 3)))
            runs += [Run(chosen["recipe"], tuple(overrides), labels, seed, root) for seed in seeds]
    return runs


def _overrides(grid: dict[str, Any], axis: str, value: Any) -> list[str]:
    table = grid["axes"].get(axis)
    if table is None:
        return []
    if isinstance(table, list):
        return [] if value is None else [template.format(value) for template in table]
    overrides: list[str] = table[value]
    return overrides


def _scale(chosen: dict[str, Any]) -> list[str]:
    if "examples" not in chosen:
        return []
    size = chosen["size"]
    steps = math.ceil(chosen["examples"] / size)
    rate = chosen["lr_at_64"] * (size / 64) ** chosen["lr_power"]
    return [
        f"batch.size={size}",
        f"train.steps={steps}",
        f"train.warmup_steps={steps // 10}",
        f"train.lr={rate:.6g}",
        f"train.log_every={max(1, steps // 20)}",
    ]
