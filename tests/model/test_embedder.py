"""Vectors equal those of the reference, alone and in any company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDEN, cases, checkpoint, item
from PIL import Image
from safetensors.numpy import load_file

from b3 import Embedder
from b3.errors import InputError

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("one_tokenizer")]

EXPECTED = load_file(GOLDEN / "embed_expected.safetensors")
ITEMS = [item(case) for case in cases()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module", params=["base", "lora", "dora"])
def variant(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Embedder]:
    adapter = None if request.param == "base" else GOLDEN / f"adapter-{request.param}"
    return request.param, Embedder.from_pretrained(folder, adapter=adapter, dtype="float32")


def test_every_case_alone_equals_the_reference(variant: tuple[str, Embedder]) -> None:
    name, model = variant
    assert np.abs(model.encode(ITEMS, max_items=1) - EXPECTED[f"{name}/normalized"]).max() < 1e-5


def test_company_and_order_do_not_matter(variant: tuple[str, Embedder]) -> None:
    name, model = variant
    order = np.random.default_rng(0).permutation(len(ITEMS))
    vectors = model.encode([ITEMS[i] for i in order], batch_tokens=4096)
    assert np.abs(vectors - EXPECTED[f"{name}/normalized"][order]).max() < 1e-5


def test_raw_vectors_equal_the_reference(variant: tuple[str, Embedder]) -> None:
    name, model = variant
    raw = model.encode(ITEMS, normalize=False)
    assert np.abs(raw - EXPECTED[f"{name}/raw"]).max() < 1e-4


def test_measuring_agrees_with_processing(folder: Path) -> None:
    processor = Embedder.from_pretrained(folder, dtype="float32").processor
    for one in ITEMS:
        assert processor.measure(one)[1] == processor(one).num_tokens


def test_image_objects_and_own_tokens_are_accepted(folder: Path) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32")
    case = next(c for c in cases() if c["id"] == "img_photo1")
    image = Image.open(GOLDEN / "images" / case["image"])
    text = case["text"].replace("<|image_1|>", "<|image_pad|>")
    vectors = model.encode([{"text": text, "image": image}, {"text": case["text"], "image": image}])
    expected = EXPECTED["base/normalized"][cases().index(case)]
    assert np.abs(vectors - expected).max() < 1e-5


def test_bfloat16_is_close(folder: Path) -> None:
    vectors = Embedder.from_pretrained(folder, dtype="bfloat16").encode(ITEMS)
    assert (vectors * EXPECTED["base/normalized"]).sum(axis=1).min() > 0.99


def test_repeated_items_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32")
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch, **kw: rows.append(len(batch)) or forward(batch, **kw))
    vectors = model.encode(["a", "b", "a", "a"])
    assert sum(rows) == 2
    assert np.array_equal(vectors[0], vectors[2])


def test_a_missing_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Embedder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no config\.json; give the folder"):
        Embedder.from_pretrained(tmp_path)
