"""Images are seen once per step when the tower is frozen, and the gradients are those of seeing them every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, checkpoint, embedder
from tiny import gradients, relative

from b3 import Embedder
from b3.data.items import Item
from b3.model.batch import collate
from b3.train.inputs import StepCollator, StepInputs
from b3.train.losses.info_nce import info_nce
from b3.train.step import CachedStep

IMAGES = [str(GOLDEN / "images" / name) for name in ("shapes1.png", "noise.png", "shapes2.png")]


class Repeating:
    """Six questions about three images; the answers are texts and, once, an image that is asked about too."""

    def query(self, row: int) -> Item:
        return Item(f"<|image_1|>\nquestion {row}", IMAGES[row % 3])

    def target(self, row: int) -> Item:
        return Item("<|image_1|>\n", IMAGES[0]) if row == 5 else Item(f"answer {row}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def inputs_of(model: Embedder, chunk_tokens: int):
    data = Repeating()
    return StepCollator([data], model.processor, chunk_tokens)([(0, i) for i in range(6)])  # type: ignore[list-item]


def counted(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call of the vision tower."""
    calls: list[int] = []
    tower = model.features
    monkeypatch.setattr(model, "features", lambda p, g: calls.append(len(g)) or tower(p, g))
    return calls


def in_passes(inputs: StepInputs, kept: int = 1) -> int:
    """Images that differ within a chunk, over all chunks and passes: chunks whose graph is kept have one."""
    seen = [len(set(inputs.chunk(i).images)) for i in range(inputs.num_chunks)]
    return 2 * sum(seen) - sum(seen[:kept])


def plain(model: Embedder) -> dict[str, torch.Tensor]:
    data = Repeating()
    sides = [
        torch.cat([model(collate([model.processor(side(i))])) for i in range(6)]) for side in (data.query, data.target)
    ]
    info_nce(*sides, 0.02).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("chunk_tokens", [20, 60, 100000])
@pytest.mark.parametrize("mib", [0, 64])
def test_gradients_do_not_depend_on_the_cache(folder: Path, kind: str, chunk_tokens: int, mib: int) -> None:
    model = embedder(folder, kind)
    expected = plain(model)
    result = CachedStep(model, vision_cache_mib=mib)(inputs_of(model, chunk_tokens), 0)
    assert (result.vision_bytes > 0) == (mib > 0 and chunk_tokens < 100000)
    for name, value in gradients(model).items():
        assert relative(value, expected[name]) < 1e-4, name


def test_each_image_is_seen_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(folder, "lora")
    calls = counted(model, monkeypatch)
    inputs = inputs_of(model, 20)
    assert inputs.num_chunks > 3 and inputs.images is not None and len(inputs.images) == 3
    CachedStep(model)(inputs, 0)
    assert sum(calls) == 3
    calls.clear()
    CachedStep(model, vision_cache_mib=0)(inputs, 0)
    assert sum(calls) == in_passes(inputs)


@pytest.mark.parametrize("kept", [1, 2, 99])
def test_kept_chunks_are_embedded_once(folder: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(folder, "dora")
    inputs, calls = inputs_of(model, 20), []
    monkeypatch.setattr(
        model, "forward", lambda *a, f=model.forward, **k: calls.append(torch.is_grad_enabled()) or f(*a, **k)
    )
    result = CachedStep(model, kept_chunks=kept)(inputs, 0)
    once = min(kept, inputs.num_chunks)
    assert calls == [True] * once + [False] * (inputs.num_chunks - once) + [True] * (inputs.num_chunks - once)
    assert (result.vision_bytes > 0) == (kept < inputs.num_chunks)
    kept_gradients = gradients(model)
    CachedStep(model)(inputs, 0)
    for name, value in gradients(model).items():
        assert torch.equal(value, kept_gradients[name]), name


def test_what_does_not_fit_is_seen_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(folder, "lora")
    expected = plain(model)
    calls = counted(model, monkeypatch)
    step, inputs = CachedStep(model), inputs_of(model, 20)
    tokens = [size // 4 for size in inputs.images.sizes]
    room = min(tokens) * model.dim * 4
    step.vision_cache_mib = room / 2**20  # type: ignore[assignment]
    result = step(inputs, 0)
    assert 0 < result.vision_bytes <= room
    assert 3 < sum(calls) < in_passes(inputs)
    for name, value in gradients(model).items():
        assert relative(value, expected[name]) < 1e-4, name


def test_a_trained_tower_is_never_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(folder, "lora")
    model.core.visual.merger.requires_grad_(True)
    expected = plain(model)
    calls = counted(model, monkeypatch)
    result = CachedStep(model)(inputs_of(model, 20), 0)
    assert result.vision_bytes == 0 and sum(calls) == in_passes(inputs_of(model, 20))
    found = gradients(model)
    assert any("visual.merger" in name for name in found)
    for name, value in found.items():
        assert relative(value, expected[name]) < 1e-4, name


def test_one_chunk_takes_one_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(folder, "lora")
    calls = counted(model, monkeypatch)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    CachedStep(model)(inputs_of(model, 100000), 0)
    assert calls == [3] and len(forwards) == 1


def test_selected_images_are_the_processors(folder: Path) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32")
    inputs = inputs_of(model, 200)
    images = inputs.images.select([2, 0])
    expected = [model.processor(Repeating().query(i)) for i in (5, 0)]
    order = {i: inputs.images_of[int(inputs.query_index[i])][0] for i in (5, 0)}
    assert order == {5: 2, 0: 0}
    assert images.patches.dtype == torch.uint8
    assert np.array_equal(images.patches.numpy(), np.concatenate([e.visuals[0].patches for e in expected]))
    assert images.grids.tolist() == [list(e.visuals[0].grid) for e in expected]
