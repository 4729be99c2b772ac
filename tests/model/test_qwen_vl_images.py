"""Inputs equal those of the reference: token ids, grids and pixels."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, cases, item
from PIL import Image

from b3.data.items import Item, Still
from b3.errors import DataError, InputError
from b3.model.backbones.qwen_vl import TowerLayout
from b3.model.backbones.qwen_vl_images import CLIP, QwenVLProcessor, target_size
from b3.model.settings import Settings

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def processor() -> QwenVLProcessor:
    return QwenVLProcessor.from_pretrained(GOLDEN / "tokenizer")


@pytest.mark.parametrize("case", cases(), ids=lambda c: c["id"])
def test_ids_grid_and_pixels_equal_the_reference(processor: QwenVLProcessor, case: dict) -> None:
    result = processor(item(case))
    assert result.input_ids.tolist() == case["input_ids"]
    if case["image"]:
        (visual,) = result.visuals
        assert [list(visual.grid)] == case["image_grid_thw"]
        pixels = CLIP.numbers(torch.from_numpy(visual.patches)).numpy()
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == case["pixel_values_sha256"]
    else:
        assert not result.visuals


def test_processing_survives_pickling(processor: QwenVLProcessor) -> None:
    case = next(c for c in cases() if c["id"] == "img_photo1")
    copy = pickle.loads(pickle.dumps(processor))
    assert np.array_equal(copy(item(case)).visuals[0].patches, processor(item(case)).visuals[0].patches)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 28), (56, 56)),
        ((64, 64), (56, 56)),
        ((70, 42), (56, 56)),
        ((2000, 3000), (812, 1204)),
        ((10, 500), (504, 504)),
    ],
)
def test_target_size_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size) == expected


def test_token_count_needs_no_pixels(processor: QwenVLProcessor) -> None:
    for width, height in ((64, 64), (20, 300), (640, 480), (3000, 9)):
        image = Still(Image.new("RGB", (width, height)))
        visual = processor.visual(image)
        assert processor.grid(image)[1] == visual.grid
        assert processor.num_features(visual.grid) == len(visual.patches) // 4


@pytest.mark.parametrize("text", ["no token", "<|image_1|> and <|image_1|>"])
def test_an_image_needs_exactly_one_token(processor: QwenVLProcessor, text: str) -> None:
    with pytest.raises(DataError, match="exactly one"):
        processor(Item(text, Image.new("RGB", (64, 64))))


def test_an_empty_text_is_refused(processor: QwenVLProcessor) -> None:
    with pytest.raises(DataError, match="needs a text or an image"):
        processor(Item(""))


def test_impossible_budget_is_refused() -> None:
    with pytest.raises(InputError, match="min_pixels"):
        QwenVLProcessor(None, Settings(min_pixels=100, max_pixels=10))


def test_an_animation_is_its_first_frame(processor: QwenVLProcessor, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "y.gif")
    moving, still = (processor(Item("<|image_1|>", tmp_path / name)).visuals[0].patches for name in ("x.gif", "y.gif"))
    assert np.array_equal(moving, still)


def test_a_decompression_bomb_is_refused_by_its_header(
    processor: QwenVLProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (300, 300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    for use in (processor, processor.measure):
        with pytest.raises(DataError, match=r"x\.png is too large"):
            use(Item("<|image_1|>", tmp_path / "x.png"))


def test_squared_images(processor: QwenVLProcessor) -> None:
    squared = QwenVLProcessor(processor.tokenizer, Settings(square=672))
    image = Still(Image.new("RGB", (100, 400)))
    assert squared.grid(image)[1] == squared.visual(image).grid == (1, 48, 48)
    assert squared.num_features((1, 48, 48)) == len(squared.visual(image).patches) // 4 == 576


def test_positions_and_boundaries_are_upstream_s() -> None:
    """Those that the vision tower would compute itself, image by image, on its device."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    grids = np.asarray([[1, 4, 6], [1, 2, 2], [3, 8, 4], [1, 4, 6]])
    layout = TowerLayout.of(grids, is_bucketed=True)
    assert torch.equal(layout.positions, get_vision_position_ids(torch.from_numpy(grids), 2))
    assert torch.equal(layout.packing.boundaries, get_vision_cu_seqlens(torch.from_numpy(grids)))
    assert sorted((b.count, b.longest) for b in layout.packing.buckets) == [(1, 4), (2, 24), (3, 32)]
