"""A whole training step on a device that is not the CPU: no tensor on the wrong side, the CPU's gradients, no waiting.

The device is a pretence (pretend_device.py), the values are real. The CPU's step is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from golden_data import checkpoint, collator, embedder
from pretend_device import host, move, pretend_device
from torch.nn.utils import clip_grad_norm_

from b3 import Embedder
from b3.data.items import Item
from b3.model.backbones import vision_language
from b3.model.backbones.heads import Heads
from b3.train.inputs import StepCollator, StepInputs
from b3.train.losses.info_nce import InfoNCE
from b3.train.optimizer import trained_parameters
from b3.train.step import CachedStep

TOLERANCE = 1e-5  # of a gradient's norm: the device's attention sums in another order
ROWS = [(0, i) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


BLOCKING = 2  # what the host waits for: the step's means, and the gradient's norm


def step_of(model: Embedder, inputs: StepInputs, **options: Any) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, gradient norm, gradients on the host) of a cached step and the clipping behind it."""
    loss = InfoNCE(0.05, **options)
    if model.device.type != "cpu":
        move(loss)
        loss.to = lambda device: loss  # type: ignore[method-assign, assignment]  # it is there already
    result = CachedStep(model, loss, seed=1)(inputs, 3)
    parameters = trained_parameters(model, loss)
    gradients = {name: host(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
    norm = float(clip_grad_norm_(parameters.values(), 1.0))
    return result.loss, norm, gradients


def on_device(build: Callable[[], tuple[Embedder, StepInputs]], **options: Any) -> Any:
    """What `step_of` gives on the device; the host must wait for no more than the bound."""
    model, inputs = build()
    with pretend_device() as session:
        move(model)
        session.blocking.clear()
        found = step_of(model, inputs, **options)
    assert session.num_blocking == BLOCKING, session.listing()
    assert session.num_async > 0
    return found


def compare(build: Callable[[], tuple[Embedder, StepInputs]], tolerance: float = TOLERANCE, **options: Any) -> None:
    """Run the step on both devices and compare; the loss to a tenth of the tolerance."""
    loss, norm, expected = step_of(*build(), **options)
    found_loss, found_norm, found = on_device(build, **options)
    assert found_loss == pytest.approx(loss, rel=tolerance / 10)
    assert found_norm == pytest.approx(norm, rel=tolerance)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():  # that of a key's bias is nothing but rounding
        assert (found[name] - gradient).norm() < tolerance * max(float(gradient.norm()), 1e-3 * norm), name


CASES: dict[str, dict[str, Any]] = {
    "dora": {"kind": "dora"},
    "dora, dropout, hard negatives": {"kind": "dora", "dropout": 0.1, "negatives": 2},
    "lora, one pass": {"kind": "lora", "chunk_tokens": 100_000},
    "lora, dropout, upstream's positions": {"kind": "lora", "dropout": 0.1, "positions": "mrope"},
    "tower and language model trained": {"kind": "dora", "dropout": 0.1, "full": True},
}


def golden_step(folder: Path, case: dict[str, Any]) -> tuple[Embedder, StepInputs]:
    model = embedder(folder, case["kind"], case.get("dropout", 0.0))
    model.settings = replace(model.settings, positions=case.get("positions", "1d"))
    if case.get("full"):
        model.backbone.get_base_model().requires_grad_(True)  # type: ignore[operator, union-attr]
    inputs = collator(model, case.get("chunk_tokens", 64), case.get("negatives", 0), share=False)(ROWS)
    return model, inputs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_on_the_device_is_that_of_the_cpu(folder: Path, case: dict[str, Any]) -> None:
    compare(lambda: golden_step(folder, case))


class Texts:
    """Pairs of short texts."""

    def query(self, row: int) -> Item:
        return Item(" ".join(["what", "is", "a", "red", "square"][: 1 + row % 5]) + f" {row}")

    def target(self, row: int) -> Item:
        return Item(f"a {tiny.COLOURS[row % 8]} {tiny.SHAPES[row % 4]} number {row}")


@pytest.mark.parametrize("kind", ["bert", "roberta", "heads"])
def test_text_encoders_and_heads_train_there(tmp_path: Path, kind: str) -> None:
    """All weights, with the dropout of the checkpoint."""
    data = Texts()
    if kind == "heads":
        Heads.tiny(tmp_path, [side(row).text for row in range(8) for side in (data.query, data.target)])
    else:
        tiny.write_text_model(tmp_path, kind)

    def build() -> tuple[Embedder, StepInputs]:
        model = Embedder.from_pretrained(tmp_path, dtype="float32", device="cpu").train()
        model.backbone.requires_grad_(True)
        return model, StepCollator([data], model.processor, 24)(ROWS)  # type: ignore[list-item]

    compare(build)


def test_every_option_of_the_loss(folder: Path) -> None:
    """Both directions, a learned temperature, and masks by the student's and by a teacher's scores."""
    rng = np.random.default_rng(0)
    teachers = [(rng.normal(size=(24, 6)).astype(np.float32), rng.normal(size=(24, 6)).astype(np.float32))]

    def build() -> tuple[Embedder, StepInputs]:
        model = embedder(folder, "dora", 0.1)
        plain = collator(model, 64, 2, share=False)
        return model, StepCollator(
            plain.datasets, model.processor, 64, plain.hard_negatives, share_duplicates=False, teachers=teachers
        )(ROWS)

    compare(build, symmetric=True, learn_temperature=True, mask_margin=0.1, mask_teacher_margin=0.2)


BROKEN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], type[Exception], str]] = {
    "a vector that makes a detour over the CPU": (lambda t: t.cpu().to(t.device), AssertionError, "copy to host"),
    "a vector left on the CPU": (lambda t: t.cpu(), RuntimeError, "tensors on pretend:0 and on cpu"),
    "a tensor made on the wrong device": (lambda t: t + torch.zeros(t.shape), RuntimeError, "vision_language.py:"),
    "a value read in the middle": (lambda t: t * float(t.sum() != 0), AssertionError, "vision_language.py:"),
    "a tensor made on the host": (lambda t: t + torch.tensor([0.0]).to(t.device), AssertionError, "unpinned memory"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_on_purpose_is_found(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, error, message = BROKEN[name]
    finish = vision_language.finish
    monkeypatch.setattr(vision_language, "finish", lambda pooled, *rest: finish(change(pooled), *rest))
    with pytest.raises(error, match=message):
        on_device(lambda: golden_step(folder, {"kind": "lora", "chunk_tokens": 100_000}))


def test_a_patch_embedding_by_matrix_product_is_the_convolution(folder: Path) -> None:
    """On the device no convolution runs; its state dictionary is upstream's."""
    model = embedder(folder, "lora")
    names = set(model.core.visual.state_dict())
    patches, patch_embed = torch.rand(16, 3 * 2 * 196), model.core.visual.patch_embed
    expected = type(patch_embed).forward(patch_embed, patches)
    with pretend_device() as session:
        move(model)
        embedded = patch_embed(patches.to(model.device))
        assert names == set(model.core.visual.state_dict())
    assert tiny.relative(host(embedded), expected.detach()) < TOLERANCE
    assert "convolution" not in session.operations
    assert "patch_embed.proj.weight" in names
