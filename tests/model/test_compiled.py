"""Compiled layers: the gradients of uncompiled ones, on a CPU with inductor's C++ in place of its GPU kernels."""

from __future__ import annotations

from pathlib import Path
from shutil import which

import pytest
import torch
from golden_data import checkpoint, collator, embedder
from PIL import Image
from tiny import gradients, in_one_graph, relative

from b3 import Embedder, registry
from b3.data.items import Item, as_item
from b3.errors import InputError
from b3.model import compiled
from b3.model.adapter import AdapterSpec, attach_adapter, norms_once
from b3.model.batch import collate
from b3.model.compiled import compile_layers
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE
from b3.train.step import CachedStep

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@needs_compiler
@pytest.mark.slow
def test_gradients_are_those_of_the_layers_as_they_were(folder: Path) -> None:
    """For images and text, and for any number of tokens in a chunk without compiling again."""
    plain, model = embedder(folder, "dora"), embedder(folder, "dora")
    assert compile_layers(model.compiled_layers(), True, CPU) == "compiled (inductor, 4 layers)"
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    for chunk_tokens in (64, 100, 10**6):
        inputs = collator(plain, chunk_tokens)([(0, row) for row in range(8)])
        exact = CachedStep(plain, InfoNCE())(inputs, 0)
        if chunk_tokens == 100:
            torch._dynamo.config.error_on_recompile = True
        try:
            ours = CachedStep(model, InfoNCE())(inputs, 0)
        finally:
            torch._dynamo.config.error_on_recompile = False
        assert ours.loss == pytest.approx(exact.loss, rel=1e-5)
        expected = gradients(plain)
        for name, gradient in gradients(model).items():
            assert relative(gradient, expected[name]) < 1e-5, name


class Texts:
    def __len__(self) -> int:
        return 8

    def query(self, row: int) -> Item:
        return Item("a question " * (row % 3 + 1) + str(row), None)

    def target(self, row: int) -> Item:
        return Item("an answer " * (row % 4 + 1) + str(row), None)


@needs_compiler
@pytest.mark.slow
def test_both_passes_drop_the_same(folder: Path) -> None:
    """Inductor draws random numbers of its own: the cached gradient is that of one graph, with a chunk's seed.

    One layer is enough, for the others draw as always: each compiled graph takes seconds.
    """
    model = embedder(folder, "dora", dropout=0.3)
    assert compile_layers(model.compiled_layers()[:1], True, CPU) == "compiled (inductor, 1 layers)"
    inputs = StepCollator([Texts()], model.processor, 40)([(0, row) for row in range(8)])  # type: ignore[list-item]
    assert inputs.num_chunks > 2
    step = CachedStep(model, InfoNCE(), seed=3)
    result = step(inputs, 0)
    cached = gradients(model)
    with norms_once(model.backbone):
        loss = in_one_graph(step, inputs)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    other = gradients(model)
    for name, value in cached.items():
        assert relative(value, other[name]) < 1e-5, name
    assert step(inputs, 1).loss != result.loss


OTHERS = [k for k in registry.BACKBONES if registry.load("backbone", k).reads_images and k != "qwen2_vl"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_layers_of_every_backbone_are_traced_as_they_are(kind: str, tmp_path: Path) -> None:
    """Whatever then compiles it: what dynamo traces runs as it stands, on one tower and the other."""
    backbone = registry.load("backbone", kind)
    backbone.tiny(tmp_path, ["a red apple", "a quick brown fox"])
    model = Embedder.from_pretrained(tmp_path, dtype="float32")
    attach_adapter(model.backbone, AdapterSpec(dropout=0.0, target_modules=backbone.adapter_targets))
    image = Image.effect_noise((112, 84), 50).convert("RGB")
    texts = [as_item("a red apple " * count) for count in (1, 3)]
    batch = collate([model.processor(item) for item in [as_item({"text": "<|image_1|>a fox", "image": image}), *texts]])
    found = []
    for compiles in (False, True):
        if compiles:
            for layer in model.compiled_layers():
                layer.compile(dynamic=True, backend="eager")
        with norms_once(model.backbone):
            vectors = model(batch)
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        found.append((vectors.detach(), gradients(model)))
    (plain, expected), (traced, ours) = found
    assert relative(traced, plain) < 1e-6
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_what_cannot_be_compiled_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = embedder(folder, "lora").compiled_layers()
    assert compile_layers(layers, False, CPU) == "eager"
    assert compile_layers(layers, "auto", CPU) == "eager (compiled on a GPU)"
    monkeypatch.setattr(compiled, "which", lambda name: None)
    with pytest.raises(InputError, match=r"model.compile true: no C compiler was found; set it to auto or false"):
        compile_layers(layers, True, CPU)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda function: lambda numbers: 1 / 0)
    with pytest.raises(InputError, match="compiling does not work here: division by zero"):
        compile_layers(layers, True, CPU)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert compile_layers(layers, "auto", torch.device("cuda")) == "eager (triton is not installed)"
