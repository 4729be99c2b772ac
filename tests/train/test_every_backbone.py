"""A run of every backbone of the registry: on one rank or two, whole or sharded, merged or apart, and as --debug."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from forks import Job
from safetensors.torch import load_file

from b3 import Embedder, registry
from b3.config import load_config
from b3.data.datasets import load_datasets, texts_of

KINDS = list({place: kind for kind, place in reversed(registry.BACKBONES.items())}.values())[::-1]  # one of each class


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_data(tmp_path_factory.mktemp("data") / "data")
    (folder / "rich").mkdir()
    pq.write_table(pa.Table.from_pylist([rich(i) for i in range(24)]), folder / "rich" / "train-0.parquet")
    return folder.parent


def rich(i: int) -> dict[str, Any]:
    """A row with two images or a video of three frames, an instruction, and one or two positives."""
    names = [f"{(7 * i + k) % 96:04}.png" for k in range(3)]
    return {
        "qry": f"which is number {i}?",
        "qry_instruction": "find the given image",
        "qry_image_path": names[:2] if i % 2 else [],
        "qry_video_path": [] if i % 2 else names,
        "pos_text": [f"number {i}", f"the other number {i}"][: 1 + i % 3 % 2],
        "pos_image_path": [[names[2]], []][: 1 + i % 3 % 2],
    }


def start(root: Path, folder: Path, kind: str) -> Path:
    """A recipe for a tiny model of this kind; data sets with images only where it reads them."""
    backbone = registry.load("backbone", kind)
    tree = tiny.recipe(root, output_dir=str(folder / "run"), train={"steps": 2, "save_merged": True})
    tree["model"] |= {"name": str(folder / "model"), "train": "adapter" if backbone.adapter_targets else "full"}
    tree["batch"]["policy"] = "random_mixed"
    tree["train"]["directions"] = ["qt", "qq", "tt", "tq"]
    if backbone.reads_images:
        tree["model"]["prompt"] = "vlm2vec"
        tree["data"]["datasets"].append({"subset": "rich"})
    else:
        tree["data"]["datasets"] = [{"subset": "words"}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    backbone.tiny(folder / "model", texts_of(load_datasets(load_config(folder / "recipe.yaml"))))
    file = folder / "model" / "config.json"
    config = json.loads(file.read_text())  # a rank draws its own dropout
    file.write_text(json.dumps({**config, **{key: 0.0 for key in config if "dropout_prob" in key}}))
    return folder / "recipe.yaml"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    adapter = run / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else run / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run(root: Path, tmp_path: Path, kind: str) -> None:
    recipe = start(root, tmp_path, kind)
    backbone = registry.load("backbone", kind)
    ways: dict[str, tuple[int, list[str]]] = {"alone": (1, []), "two": (2, [])}
    model = Embedder.from_pretrained(tmp_path / "model", dtype="float32")
    if backbone.adapter_targets and model.layers():
        ways["sharded"] = (2, ["model.shard=true", "train.save_merged=false"])
    for name, (ranks, more) in ways.items():
        job = Job(tmp_path / "logs" / name, str(recipe), f"output_dir={tmp_path / name}", *more, ranks=ranks)
        assert job.wait() == [0] * ranks, job.text()
    expected = weights(tmp_path / "alone")
    bare = dict(model.backbone.state_dict())
    assert any(not torch.equal(value, bare.get(name, value + 1)) for name, value in expected.items())
    for name in list(ways)[1:]:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
        found = weights(tmp_path / name)
        assert found.keys() == expected.keys()
        # Adam's first steps have the size of lr whatever the gradient, so rounding shows where a gradient is near zero
        moved = torch.cat([(found[key] - value).abs().flatten() for key, value in expected.items()])
        assert float((moved > 1e-4).double().mean()) < 0.01
    check_vectors(root, tmp_path, bool(backbone.reads_images), bool(backbone.adapter_targets))


def check_vectors(root: Path, folder: Path, reads_images: bool, adapted: bool) -> None:
    """Of the trained model, of its merged weights, and of a saved copy of these: one and the same."""
    items: list[Any] = ["what is a red square number 1?\n", "what is a blue bar number 3?\n"]
    if reads_images:
        pictures = [tiny.image(colour, "disc", i) for i, colour in enumerate(tiny.COLOURS[:3])]
        items += [
            {"text": tiny.QUERY, "image": pictures[0]},
            {"text": "which?", "images": pictures, "instruction": "find"},
        ]
        items += [{"text": "which?", "video": pictures}]
    else:
        items = [item.text for item, _ in load_datasets(load_config(folder / "recipe.yaml"))[0]][:3]
    trained = Embedder.from_pretrained(folder / "alone", dtype="float32")
    vectors = trained.encode(items)
    bare = Embedder.from_pretrained(folder / "model", dtype="float32", prompt=trained.settings.prompt).encode(items)
    assert np.abs(vectors - bare).max() > 1e-4
    trained.save(folder / "copy")
    copies = [folder / "copy", *([folder / "alone" / "merged"] if adapted else [])]
    for copy in copies:
        again = Embedder.from_pretrained(copy, dtype="float32")
        assert again.settings == trained.settings
        assert np.abs(again.encode(items) - vectors).max() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_debug_run(root: Path, tmp_path: Path, kind: str) -> None:
    if kind == "b3_heads":
        pytest.skip("reads stored vectors, of which a debug run's rows have none")
    recipe = start(root, tmp_path, kind)
    job = Job(tmp_path / "logs", str(recipe), f"output_dir={tmp_path / 'run'}", "--debug")
    assert job.wait() == [0], job.text()
    kept = json.loads((tmp_path / "run-debug" / "config.json").read_text())["model_type"]
    assert len(losses(tmp_path / "run-debug")) == 3
    assert kept == kind or not registry.load("backbone", kind).reads_images
