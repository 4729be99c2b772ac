"""Settings travel with a checkpoint: what a run trained with is what its own card's snippet loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml

import train
from b3 import Embedder
from b3.config import load_config
from b3.data.items import as_item
from b3.errors import InputError
from b3.model.batch import collate
from b3.model.checkpoint import checkpoint_key
from b3.train.build import build_embedder

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    return folder


def trained_vectors(recipe: Path, folder: Path, items: list[Any]) -> np.ndarray:
    """Vectors of the model as it was trained: built from the recipe, with the trained weights put in place."""
    from b3.model.adapter import load_trainable

    config = load_config(recipe)
    model = build_embedder(config)
    if config.model.train == "full":
        model.load_weights(folder)
    else:
        load_trainable(model.backbone, folder)
    model.eval()
    with torch.no_grad():
        batch = collate([model.processor(as_item(item)) for item in items])
        vectors: np.ndarray = model(batch).numpy()
    return vectors


def of_snippet(card: str) -> tuple[list[np.ndarray], list[str]]:
    """Vectors of each model that the card's Python snippet loads, run as it stands, in float32."""
    code = card.split("```python\n")[1].split("```")[0]
    lines, vectors = code.strip().splitlines(), []
    models = [line for line in lines if line.startswith("model = ")]
    for line in models:
        names: dict[str, Any] = {}
        assert ")" in line
        body = line.split("  #")[0].rstrip()
        body = body[: body.rindex(")")] + ', dtype="float32")'  # the tiny model was trained in float32
        exec("\n".join([lines[0], body, lines[-1]]), names)
        vectors.append(names["vectors"])
    return vectors, models


@pytest.mark.parametrize("key", ["model.max_pixels=12544", "model.positions=mrope"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_cards_snippet_gives_the_vectors_of_the_trained_model(
    root: Path, tmp_path: Path, kind: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(big_image())
    tree = tiny.recipe(root, output_dir=str(tmp_path / "run"), train={"steps": 1, "save_merged": kind == "adapter"})
    if kind == "full":
        tree["model"]["train"] = "full"
        del tree["adapter"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    name, value = key.removeprefix("model.").split("=")
    tree["model"][name] = yaml.safe_load(value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train.main([str(tmp_path / "recipe.yaml")]) == 0
    vectors, models = of_snippet((tmp_path / "run" / "README.md").read_text())
    assert len(models) == (2 if kind == "adapter" else 1)
    item = {"text": "<|image_1|>\nRepresent the given image.\n", "image": "image.png"}
    expected = trained_vectors(tmp_path / "recipe.yaml", tmp_path / "run", [item])
    for found in vectors:
        np.testing.assert_allclose(found, expected, atol=1e-5)
    folder = str(tmp_path / "run") if kind == "full" else str(root / "model")
    adapter = None if kind == "full" else str(tmp_path / "run")
    other = {"max_pixels": 1003520} if name == "max_pixels" else {"positions": "1d"}
    plain = Embedder.from_pretrained(folder, adapter=adapter, dtype="float32", **other).encode([item])
    assert np.abs(plain - expected).max() > 1e-3, "explicit arguments win, and the setting shows"


def big_image() -> bytes:
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (224, 336, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_settings_of_the_adapter_come_before_those_of_the_base(root: Path, tmp_path: Path) -> None:
    saved = Embedder.from_pretrained(root / "model", dtype="float32", max_pixels=6272, positions="mrope", max_length=9)
    saved.save(tmp_path / "base")
    again = Embedder.from_pretrained(tmp_path / "base", dtype="float32")
    assert again.settings == saved.settings
    assert Embedder.from_pretrained(tmp_path / "base", dtype="float32", max_pixels=12544).settings.max_pixels == 12544
    from b3.model.settings import read_settings

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "b3_settings.json").write_text(json.dumps({"format": 1, "positions": "1d"}))
    both = read_settings(tmp_path / "adapter", tmp_path / "base")
    assert (both["positions"], both["max_pixels"], both["max_length"]) == ("1d", 6272, 9)


def test_a_checkpoint_of_other_settings_has_another_key(root: Path, tmp_path: Path) -> None:
    model = Embedder.from_pretrained(root / "model", dtype="float32")
    model.save(tmp_path / "saved")
    before = checkpoint_key(tmp_path / "saved")
    Embedder.from_pretrained(root / "model", dtype="float32", max_length=9).save_settings(tmp_path / "saved")
    assert checkpoint_key(tmp_path / "saved") != before


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"format": 2}, "has format 2, this b3 reads 1; update b3"),
        ({"format": 1, "frame_rate": 2}, "setting 'frame_rate' is not known; update b3"),
        ({"format": 1, "positions": "2d"}, "'2d' is not known; use one of 1d, mrope"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(
    root: Path, tmp_path: Path, tree: dict[str, Any], message: str
) -> None:
    Embedder.from_pretrained(root / "model", dtype="float32").save(tmp_path / "saved")
    (tmp_path / "saved" / "b3_settings.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(tmp_path / "saved")
