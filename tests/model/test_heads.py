"""Heads over frozen vectors: untrained they change nothing, trained they are read back, mistakes are named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from b3 import Embedder
from b3.config import load_config
from b3.data.items import Item
from b3.errors import DataError, InputError
from b3.model.backbones.heads import write_heads, write_vectors
from b3.train.run import train

TEXTS = [f"text {i}" for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=(len(TEXTS), 12)).astype(np.float32)
    write_vectors(tmp_path / "vectors", [Item(text) for text in TEXTS], vectors)
    np.save(tmp_path / "raw.npy", vectors)
    write_heads(tmp_path / "heads", tmp_path / "vectors", hidden=16, blocks=2)
    return tmp_path


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_untrained_heads_give_the_vectors(folder: Path) -> None:
    model = Embedder.from_pretrained(folder / "heads")
    np.testing.assert_allclose(model.encode(TEXTS), unit(np.load(folder / "raw.npy")), atol=1e-6)
    assert model.dim == 12


def test_blocks_are_residual_mlps(folder: Path) -> None:
    model = Embedder.from_pretrained(folder / "heads")
    torch.manual_seed(0)
    for parameter in model.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = np.load(folder / "raw.npy").astype(np.float64)
    for block in model.backbone.blocks:
        weights = {name: value.detach().numpy().astype(np.float64) for name, value in block.named_parameters()}
        centred = x - x.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        inner = (normed * weights["norm.weight"] + weights["norm.bias"]) @ weights["up.weight"].T + weights["up.bias"]
        erf = torch.erf(torch.from_numpy(inner / np.sqrt(2))).numpy()
        x = x + (0.5 * inner * (1 + erf)) @ weights["down.weight"].T + weights["down.bias"]
    np.testing.assert_allclose(model.encode(TEXTS), unit(x), atol=1e-5)


def test_a_run_trains_them_and_its_folder_is_a_model(folder: Path) -> None:
    pairs = [
        {"qry": TEXTS[i], "pos_text": TEXTS[i + 30], "qry_image_path": "", "pos_image_path": ""} for i in range(30)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: heads
output_dir: {folder}/run
model: {{name: {folder}/heads, train: full, dtype: float32}}
data: {{source: "jsonl:{folder}/pairs.jsonl", prefix_targets: false, datasets: [{{subset: pairs}}]}}
mining: {{dir: {folder}/plans, teacher: {folder}}}
batch: {{size: 10, policy: random}}
train: {{steps: 30, lr: 0.01, save_every: 10}}
"""
    )
    before = Embedder.from_pretrained(folder / "heads").encode(TEXTS)
    train(load_config(recipe))
    after = Embedder.from_pretrained(folder / "run").encode(TEXTS)
    own = (after[:30] * after[30:]).sum(axis=1).mean()
    assert own > (before[:30] * before[30:]).sum(axis=1).mean() + 0.2
    (folder / "run" / "result.json").unlink()  # as after a kill between two checkpoints
    shutil.rmtree(folder / "run" / "checkpoint-30")
    train(load_config(recipe))
    np.testing.assert_array_equal(Embedder.from_pretrained(folder / "run").encode(TEXTS), after)


def test_an_unknown_item_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"text 'never seen'.*no vector of it in keys\.npy"):
        Embedder.from_pretrained(folder / "heads").encode(["text 1", "never seen"])


def test_vectors_of_another_width_are_refused(folder: Path) -> None:
    np.save(folder / "vectors" / "vectors.npy", np.zeros((len(TEXTS), 7), dtype=np.float32))
    with pytest.raises(InputError, match=r"shape \(60, 7\).*hidden_size 12"):
        Embedder.from_pretrained(folder / "heads")


def test_an_adapter_is_refused_and_an_unused_setting_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="takes no adapter"):
        Embedder.from_pretrained(folder / "heads", adapter=folder)
    Embedder.from_pretrained(folder / "heads", max_pixels=99)
    assert "note: max_pixels 99 changes nothing" in capsys.readouterr().err
