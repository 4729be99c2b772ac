"""Adapters: merging against peft's own forward, nothing silently left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from golden_data import GOLDEN, cases, checkpoint, item
from safetensors.torch import load_file, save_file

from b3 import Embedder
from b3.errors import InputError
from b3.model.adapter import PAPER_TARGETS, AdapterSpec, attach_adapter, load_trainable, new_name
from b3.model.batch import collate

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_tokenizer")]

ITEMS = [item(case) for case in cases()[:8]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    return checkpoint(root)


def trainable(folder: Path, dora: bool, dropout: float = 0.0) -> Embedder:
    model = Embedder.from_pretrained(folder, dtype="float32")
    model.backbone = attach_adapter(model.backbone, AdapterSpec(use_dora=dora, dropout=dropout))
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_equals_attached(folder: Path, kind: str) -> None:
    attached = trainable(folder, kind == "dora")
    load_trainable(attached.backbone, GOLDEN / f"adapter-{kind}")
    attached.eval()
    merged = Embedder.from_pretrained(folder, adapter=GOLDEN / f"adapter-{kind}", dtype="float32")
    assert np.abs(attached.encode(ITEMS) - merged.encode(ITEMS)).max() < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_saved_and_merged_equals_trained(folder: Path, tmp_path: Path, dora: bool) -> None:
    model = trainable(folder, dora)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save(tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "the same bytes from every process"
    model.eval()
    merged = Embedder.from_pretrained(folder, adapter=tmp_path / "adapter", dtype="float32")
    assert np.abs(model.encode(ITEMS) - merged.encode(ITEMS)).max() < 1e-5


def test_paper_targets_hit_the_language_model_only(folder: Path) -> None:
    names = tiny.matched_modules(trainable(folder, dora=True).backbone)
    suffixes = ("mlp.down_proj", *(f"self_attn.{x}_proj" for x in "kqvo"))
    expected = {f"model.language_model.layers.{i}.{suffix}" for i in range(2) for suffix in suffixes}
    assert set(names) == expected
    assert "qkv_proj" in PAPER_TARGETS


def test_an_adapter_repository_brings_its_base(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(GOLDEN / "adapter-lora", repository)
    config = json.loads((repository / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (repository / "adapter_config.json").write_text(json.dumps(config))
    direct = Embedder.from_pretrained(folder, adapter=GOLDEN / "adapter-lora", dtype="float32")
    assert np.array_equal(Embedder.from_pretrained(repository, dtype="float32").encode(ITEMS), direct.encode(ITEMS))


def test_a_pickled_adapter_is_read_as_weights_only(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "bin"
    shutil.copytree(GOLDEN / "adapter-dora", repository)
    torch.save(load_file(repository / "adapter_model.safetensors"), repository / "adapter_model.bin")
    (repository / "adapter_model.safetensors").unlink()
    ours = Embedder.from_pretrained(folder, adapter=repository, dtype="float32").encode(ITEMS)
    theirs = Embedder.from_pretrained(folder, adapter=GOLDEN / "adapter-dora", dtype="float32").encode(ITEMS)
    assert np.array_equal(ours, theirs)
    torch.save({"x": Path("/")}, repository / "adapter_model.bin")  # an object, not a tensor: refused, not executed
    with pytest.raises(InputError, match="cannot be read"):
        Embedder.from_pretrained(folder, adapter=repository, dtype="float32")


def broken(tmp_path: Path, change: str) -> Path:
    root = tmp_path / change
    shutil.copytree(GOLDEN / "adapter-dora", root)
    tensors = load_file(root / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    if change == "unknown":
        tensors = {name.replace(".layers.1.", ".layers.7."): value for name, value in tensors.items()}
    elif change == "missing":
        del tensors[first]
    elif change == "shape":
        tensors[first] = torch.zeros(8, 3)
    elif change == "odd":
        tensors["something.else"] = torch.zeros(1)
    save_file(tensors, root / "adapter_model.safetensors")
    if change == "torn":
        data = (root / "adapter_model.safetensors").read_bytes()
        (root / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown", "does not exist"),
        ("missing", "expected"),
        ("shape", "shape"),
        ("odd", "not a LoRA"),
        ("torn", "cannot be read"),
    ],
)
def test_a_tensor_that_does_not_fit_is_an_error(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(folder, adapter=broken(tmp_path, change), dtype="float32")


def test_old_names_are_mapped() -> None:
    old = "base_model.model.model.layers.3.mlp.down_proj.lora_A.weight"
    assert new_name(old) == "base_model.model.model.language_model.layers.3.mlp.down_proj.lora_A.weight"
    assert new_name(new_name(old)) == new_name(old)


def test_targets_that_match_nothing_are_an_error(folder: Path) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32")
    with pytest.raises(InputError, match="target_modules"):
        attach_adapter(model.backbone, AdapterSpec(target_modules="nothing_here"))


def test_a_gradient_reaches_every_adapter_tensor(folder: Path) -> None:
    model = trainable(folder, dora=True)
    model(collate([model.processor(i) for i in ITEMS])).square().sum().backward()
    model(collate([model.processor(i) for i in ITEMS]))[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
