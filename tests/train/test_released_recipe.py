"""The released recipe on a stand-in of the MMEB layout: it prints its plan and trains; mistakes are one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from forks import Job

from b3.config import Config, load_config
from b3.mining.recipe import mine_recipe
from train import main

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "b3pp_qwen2vl_2b.yaml"
ROWS = 96


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 subsets as `<subset>/original-*.parquet` and images below `images/<subset>/`, as MMEB-train has them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("mmeb")
    config = load_config(RECIPE)
    rng = np.random.default_rng(0)
    for entry in config.data.datasets:
        name = entry.subset
        (root / "images" / name).mkdir(parents=True)
        (root / name).mkdir()
        columns: dict[str, list[str]] = {"qry": [], "qry_image_path": [], "pos_text": [], "pos_image_path": []}
        for row in range(ROWS):
            path = f"images/{name}/{row}.jpg"
            buffer = io.BytesIO()
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            Image.new("RGB", (56, 84), colour).save(buffer, "JPEG")
            (root / path).write_bytes(buffer.getvalue())
            label = f"label {row % 48}" if entry.family == "classification" else f"answer {row} of {name}"
            columns["qry"].append(f"<|image_1|>\nRepresent the given image, row {row}.\n")
            columns["qry_image_path"].append(path)
            columns["pos_text"].append(label)
            columns["pos_image_path"].append("")
        columns["neg_text"] = [""] * ROWS
        columns["neg_image_path"] = [""] * ROWS
        pq.write_table(pa.table(columns), root / name / "original-00000-of-00001.parquet")
    tiny.write_model(root / "model")
    return root


def overrides(layout: Path, run: Path) -> list[str]:
    """What a user without the hub and without a GPU changes, and sizes that fit 96 rows."""
    return [
        f"data.source=parquet:{layout}", f"data.image_dir={layout}", f"model.name={layout}/model",
        "model.dtype=float32", "train.bf16=false", f"output_dir={run}", f"mining.dir={layout}/mining",
        "batch.size=32", "mining.k=8", "train.steps=2", "train.warmup_steps=1", "train.workers=0",
        f"mining.teacher={layout}/teacher",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mined(layout: Path) -> Config:
    """Plans of all 20 subsets, from random teacher vectors."""
    config = load_config(RECIPE, overrides(layout, layout / "run"))
    (layout / "teacher").mkdir()
    rng = np.random.default_rng(0)
    for entry in config.data.datasets:
        for side in ("queries", "targets"):
            vectors = rng.standard_normal((ROWS, 8)).astype(np.float32)
            np.save(layout / "teacher" / f"{entry.subset}_{side}.npy", vectors)
    mine_recipe(config)
    return config


def test_the_released_recipe_starts_and_prints_its_plan(layout: Path, mined: Config, tmp_path: Path) -> None:
    job = Job(tmp_path / "logs", str(RECIPE), *overrides(layout, tmp_path / "run"))
    assert job.wait() == [0], job.text()
    text = job.text()
    assert "b3pp_qwen2vl_2b: 2 steps of 32 pairs, policy b3 (4 communities of 8)" in text
    for entry in mined.data.datasets:
        assert f"  {entry.subset}: {ROWS} rows, 3 batches per epoch, " in text
    assert "  60 batches per epoch, 191 negatives per query (5 hard negatives per row)" in text
    for word in ("tokens per step in about", "parameters are trained", "memory of a rank, about"):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=parquet:/nowhere"], "split 'original' in parquet:/nowhere, where nothing is"),
        (["mining.dir=/nowhere"], "no batch plan in /nowhere/ImageNet_1K; mine it first"),
        (["train.bf16=true"], "train.bf16 true needs a GPU and none is visible"),
        (["model.dtype=bfloat16"], "model.dtype bfloat16 needs a GPU and none is visible"),
        (["model.name=/nowhere/model"], "model folder /nowhere/model does not exist"),
        (["model.init_adapter=/nowhere/adapter"], "/nowhere/adapter does not exist"),
        (["train.trackers=[trackio]"], "trackio is not installed; pip install 'b3[trackers]'"),
        (["train.trackers=[tensorbord]"], "'tensorboard'"),
        (["eval.every=1", "eval.source=parquet:/nowhere"], "in parquet:/nowhere"),
        (["output_dir={layout}/images"], "and no run of b3; choose another output_dir"),
        (["batch.size=100"], "not a multiple of mining.k 8; use 96 or 104"),
    ],
)
def test_a_new_users_mistake_is_one_line(
    layout: Path,
    mined: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    given = [o.format(layout=layout) for o in changes]
    if "trackio" in str(changes):
        from importlib.util import find_spec

        if find_spec("trackio"):
            pytest.skip("trackio is installed")
    assert main([str(RECIPE), *overrides(layout, tmp_path / "run"), *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("error: ") and message in line


def test_a_missing_teacher_is_one_line(layout: Path) -> None:
    from b3.errors import InputError

    given = [*overrides(layout, layout / "run"), f"mining.dir={layout}/none", f"mining.teacher={layout}/missing"]
    with pytest.raises(InputError, match="missing does not exist; give a checkpoint folder or a hub name"):
        mine_recipe(load_config(RECIPE, given))
