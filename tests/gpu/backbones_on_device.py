"""A training step and encoding of every vision-language backbone, on a device that is not the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding_on_device import compare as compare_encoding
from PIL import Image
from step_on_device import compare

from b3 import Embedder, registry
from b3.data.items import Item, as_item
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.train.inputs import StepCollator, StepInputs

TEXTS = ["a red square number", "a blue circle on a lamp", "house, tree and river; the cat sleeps"] * 20
KINDS = [kind for kind in registry.BACKBONES if registry.load("backbone", kind).reads_images and kind != "qwen2_vl"]


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


FILM = [noise(20 + i, 70, 90) for i in range(4)]
ITEMS: list[dict[str, Any]] = [
    {"text": "a red square"},
    {"text": "number", "image": noise(1, 100, 60)},
    {"text": "the cat sleeps", "images": [noise(2, 64, 64), noise(3, 60, 130)]},
    {"text": "a lamp", "video": FILM},
    {"text": "a river", "images": [noise(4, 90, 90)], "video": FILM[:2]},
]


class Pairs:
    """Queries are the items, targets are texts."""

    def query(self, row: int) -> Item:
        return as_item(ITEMS[row])

    def target(self, row: int) -> Item:
        return Item(f"{TEXTS[row % 3]} {row}")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = registry.load("backbone", request.param).tiny(tmp_path_factory.mktemp(request.param), TEXTS)
    return made


def load(folder: Path) -> Embedder:
    budget = {} if "internvl" in folder.name else {"max_pixels": 100 * 100, "positions": "mrope"}
    return Embedder.from_pretrained(folder, dtype="float32", device="cpu", prompt="vlm2vec", **budget)


def tolerance_of(folder: Path) -> float:
    """Of a gradient's norm: linear attention, in upstream's torch code, adds up more rounding."""
    return 5e-4 if "qwen3_5" in folder.name else 5e-5


@pytest.mark.parametrize("chunk_tokens", [60, 100_000])
def test_a_step_on_the_device_is_that_of_the_cpu(folder: Path, chunk_tokens: int) -> None:
    def build() -> tuple[Embedder, StepInputs]:
        model = load(folder)
        torch.manual_seed(0)
        spec = AdapterSpec(4, 8, 0.1, True, target_modules=type(model).adapter_targets)
        model.backbone = attach_adapter(model.backbone, spec)
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        collator = StepCollator([Pairs()], model.processor, chunk_tokens, share_duplicates=False)  # type: ignore[list-item]
        return model.train(), collator([(0, i) for i in range(5)])

    compare(build, tolerance_of(folder))


def test_all_options_of_directions(folder: Path) -> None:
    """All four directions, several right targets, a closed row and a temperature for each row."""

    class More(Pairs):
        def positives(self, row: int) -> list[Item]:
            return [self.target(row), self.target((row + 1) % 5)]

    def build() -> tuple[Embedder, StepInputs]:
        model = load(folder)
        model.backbone.requires_grad_(True)
        data: list[Any] = [More(), More()]
        collator = StepCollator(
            data, model.processor, 60, share_duplicates=False, temperatures=[0.05, 0.1], closed=[False, True],
            num_known=2, hard_negatives=[np.array([[(i + 2) % 5] for i in range(5)])] * 2,
        )  # fmt: skip
        return model, collator([(0, 0), (1, 1), (0, 2), (0, 3), (1, 4)])

    compare(build, tolerance_of(folder), directions=["qt", "qq", "tt", "tq"], mask_margin=0.3)


def test_encoding_waits_once_per_batch(folder: Path) -> None:
    compare_encoding(load(folder), [*TEXTS[:5], *ITEMS], 40)
