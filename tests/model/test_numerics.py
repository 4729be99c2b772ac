"""Switches of positions and rounding: against upstream's own forward and against the reference's recorded vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, cases, checkpoint, item
from safetensors.numpy import load_file
from transformers import Qwen2VLForConditionalGeneration

from b3 import Embedder
from b3.errors import InputError
from b3.model.backbones.qwen_vl_images import CLIP

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_tokenizer")]

EXPECTED = load_file(GOLDEN / "embed_expected.safetensors")
CASES = [case for case in cases() if not case["id"].startswith("stray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def test_mrope_equals_upstream(folder: Path) -> None:
    """Upstream's unchanged forward, one item at a time, choosing its own 3-D positions."""
    model = Embedder.from_pretrained(folder, dtype="float32", positions="mrope")
    ours = model.encode([item(case) for case in CASES])
    upstream = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().model
    for row, case in zip(ours, CASES, strict=True):
        one = model.processor(item(case))
        ids = torch.from_numpy(one.input_ids)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for visual in one.visuals:
            inputs["pixel_values"] = CLIP.numbers(torch.from_numpy(visual.patches))
            inputs["image_grid_thw"] = torch.tensor([visual.grid])
            inputs["mm_token_type_ids"] = (ids == int(model.processor.media_ids[0])).int()
        with torch.no_grad():
            hidden = upstream(**inputs).last_hidden_state[0, -1]
        theirs = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        assert np.abs(row - theirs).max() < 1e-5, case["id"]


def test_positions_matter_for_images_only(folder: Path) -> None:
    plain, mrope = (Embedder.from_pretrained(folder, dtype="float32", positions=p) for p in ("1d", "mrope"))
    items = [item(case) for case in CASES]
    change = np.abs(plain.encode(items) - mrope.encode(items)).max(axis=1)
    has_image = np.asarray([case["image"] is not None for case in CASES])
    assert change[has_image].max() > 0.05
    assert change[~has_image].max() < 1e-6


def test_reference_numerics_round_the_rotary_frequencies(folder: Path) -> None:
    """float32 with frequencies rounded to bfloat16, as recorded from the reference."""
    model = Embedder.from_pretrained(folder, dtype="float32", numerics="reference")
    ours = model.encode([item(case) for case in cases()])
    assert np.abs(ours - EXPECTED["fp32_bf16rope/base/normalized"]).max() < 1e-5
    assert np.abs(ours - EXPECTED["base/normalized"]).max() > 1e-3


def test_reference_numerics_come_closer_in_bfloat16(folder: Path) -> None:
    recorded = EXPECTED["bf16/base/query_autocast/normalized"]
    items = [item(case) for case in cases()]
    change = {}
    for numerics in ("clean", "reference"):
        vectors = Embedder.from_pretrained(folder, dtype="bfloat16", numerics=numerics).encode(items, max_items=1)
        change[numerics] = float(np.abs(vectors - recorded).mean())
    assert change["reference"] < change["clean"]


def test_unknown_switches_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="use one of 1d, mrope"):
        Embedder.from_pretrained(folder, positions="2d")
    with pytest.raises(InputError, match="use one of clean, reference"):
        Embedder.from_pretrained(folder, numerics="exact")
    with pytest.raises(InputError, match="varlen needs a GPU"):
        Embedder.from_pretrained(folder, attention="varlen")
    with pytest.raises(InputError, match="use one of auto, sdpa, varlen"):
        Embedder.from_pretrained(folder, attention="flash_attention_2")
