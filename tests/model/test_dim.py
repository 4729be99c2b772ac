"""Vectors cut to their first numbers: by every backbone, stored with the checkpoint, evaluated, indexed, mined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from b3 import Embedder, registry
from b3.config import load_config
from b3.data.datasets import load_dataset
from b3.data.items import as_item
from b3.errors import DataError, InputError
from b3.eval.run import EvalSpec
from b3.mining.recipe import mine_recipe
from b3.mining.teacher import load_teacher, teacher_embeddings
from b3.model.batch import collate
from b3.model.settings import Settings
from scripts import embed, search

pytestmark = pytest.mark.core

TEXTS = ["a red square", "a blue circle", "the house, the tree and the river"]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("kind", sorted(registry.BACKBONES))
def test_a_cut_vector_is_the_prefix_normalised_again(tmp_path: Path, kind: str) -> None:
    folder = registry.load("backbone", kind).tiny(tmp_path / "model", TEXTS * 20)
    whole = Embedder.from_pretrained(folder, dtype="float32")
    short = Embedder.from_pretrained(folder, dtype="float32", dim=6)
    assert (whole.dim, short.dim, short.width) == (whole.width, 6, whole.width)
    expected = whole.encode(TEXTS)[:, :6]
    np.testing.assert_allclose(short.encode(TEXTS), unit(expected), atol=1e-6)
    np.testing.assert_array_equal(short.encode(TEXTS, normalize=False), whole.encode(TEXTS, normalize=False)[:, :6])
    with torch.no_grad():
        short.eval()
        batch = collate([short.processor(as_item(text)) for text in TEXTS])
        np.testing.assert_allclose(short(batch).numpy(), unit(expected), atol=1e-6)
    short.save(tmp_path / "saved")
    assert Embedder.from_pretrained(tmp_path / "saved", dtype="float32").dim == 6
    whole.save(tmp_path / "plain")
    assert "dim" not in json.loads((tmp_path / "plain" / "b3_settings.json").read_text())
    with pytest.raises(InputError, match=f"dim {whole.width + 1} exceeds the {whole.width} numbers of a vector"):
        Embedder.from_pretrained(folder, dtype="float32", dim=whole.width + 1)


def test_an_evaluation_cuts_as_asked_or_as_the_checkpoint_says(tmp_path: Path) -> None:
    tiny.write_text_model(tmp_path / "model")
    Embedder.from_pretrained(tmp_path / "model", dtype="float32", dim=6).save(tmp_path / "saved")

    def dim(**settings: int) -> int:
        return EvalSpec(str(tmp_path / "saved"), "embedded:emoji", settings=Settings(**settings)).load().dim

    assert (dim(), dim(dim=4), dim(dim=8)) == (6, 4, 8)


def test_an_index_is_made_and_searched_at_a_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_text_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def index(name: str, *more: str) -> np.ndarray:
        arguments = ["--model", str(tmp_path / "model"), "--input", str(rows), "--out", str(tmp_path / name)]
        assert embed.main([*arguments, "--dtype", "float32", *more]) == 0
        vectors: np.ndarray = np.load(tmp_path / name / "embeddings.npy")
        return vectors

    whole, short = index("whole"), index("short", "--dim", "6")
    np.testing.assert_allclose(short, unit(whole[:, :6]), atol=1e-6)
    capsys.readouterr()
    found = []
    for arguments in (["--index", str(tmp_path / "whole"), "--dim", "6"], ["--index", str(tmp_path / "short")]):
        assert search.main([*arguments, "--query", TEXTS[1], "--top", "3"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert search.main(["--index", str(tmp_path / "short"), "--query", "a", "--dim", "7"]) == 2
    assert "--dim 7 exceeds the 6 numbers" in capsys.readouterr().err


def test_a_plan_is_mined_on_the_first_numbers_of_the_teacher(tmp_path: Path) -> None:
    tiny.write_data(tmp_path / "data")
    recipe = tiny.write_recipe(tmp_path)
    (tmp_path / "teacher").mkdir()
    for side in ("queries", "targets"):
        for subset in ("pictures", "words"):
            file = tmp_path / "teacher" / f"{subset}_{side}.npy"
            np.save(file, np.random.default_rng(len(side)).normal(size=(96, 12)))
    given = [f"mining.teacher={tmp_path / 'teacher'}"]
    config = load_config(recipe, [*given, "mining.teacher_dim=5"])
    entry = config.data.datasets[0]
    arrays = teacher_embeddings(config, entry, load_dataset(config, entry), load_teacher(config))
    for side, array in zip(("queries", "targets"), arrays, strict=True):
        np.testing.assert_array_equal(array, np.load(tmp_path / "teacher" / f"{entry.subset}_{side}.npy")[:, :5])
    plans = mine_recipe(config)
    assert plans[entry.subset].manifest["teacher"].endswith("teacher, the first 5 numbers")
    with pytest.raises(InputError, match=r"teacher was"):
        mine_recipe(load_config(recipe, given))
    config = load_config(recipe, [*given, "mining.teacher_dim=13"])
    with pytest.raises(DataError, match=r"mining.teacher_dim 13 exceeds the teacher's 12 numbers"):
        teacher_embeddings(config, entry, load_dataset(config, entry), None)
