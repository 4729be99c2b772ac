"""Published embedders: ids, positions, grids, bytes and vectors of their own programs (tests/golden/README.md)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, checkpoint
from safetensors.torch import load_file, save_file

from b3 import Embedder
from b3.data.items import Item, Still, as_item
from b3.errors import DataError, InputError
from b3.model.backbones.internvl import InternVL, InternVLProcessor, pixels_of, tile_grid, tiles_of
from b3.model.backbones.qwen_vl_images import gme_first_size
from b3.model.batch import Batch
from b3.model.checkpoint import load_tokenizer
from b3.model.settings import Settings

pytestmark = pytest.mark.usefixtures("one_tokenizer")

QWEN3, GME, INTERNVL = (GOLDEN / name for name in ("qwen3_vl_embedding", "gme", "internvl"))


def cases_of(folder: Path, *keys: str) -> list[dict]:
    tree = json.loads((folder / "cases.json").read_text())
    return [case for key in keys for case in tree[key]]


def placed(value: Any, folder: Path) -> Any:
    return [placed(one, folder) for one in value] if isinstance(value, list) else folder / value


def item_of(case: dict, folder: Path) -> dict:
    media = {key: placed(case["item"][key], folder) for key in ("image", "video") if case["item"].get(key) is not None}
    return {key: value for key, value in case["item"].items() if key in ("text", "instruction")} | media


@pytest.fixture(scope="module")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3-VL with its whole embedding table: rows that no case uses are zero and not stored."""
    folder = tmp_path_factory.mktemp("qwen3")
    for file in [*(QWEN3 / "tiny-qwen3vl").iterdir(), *(GOLDEN / "tokenizer").iterdir()]:
        shutil.copy(file, folder / file.name)
    weights = load_file(folder / "model.safetensors")
    rows, values = weights.pop("embedding_rows"), weights.pop("embedding_values")
    table = torch.zeros(151936, values.shape[1], dtype=values.dtype)
    table[rows] = values
    save_file(weights | {"model.language_model.embed_tokens.weight": table}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def qwen3(qwen3_folder: Path) -> Embedder:
    return Embedder.from_pretrained(qwen3_folder, prompt="qwen3_vl_embedding", dtype="float32")


QWEN3_EXPECTED = load_file(QWEN3 / "expected.safetensors")
QWEN3_ROWS = json.loads((QWEN3 / "cases.json").read_text())["row_order"]
QWEN3_CASES = cases_of(QWEN3, "cases")


@pytest.mark.parametrize("case", [c for c in QWEN3_CASES if not c.get("fallback")], ids=lambda c: c["id"])
def test_qwen3_vl_embedding(qwen3: Embedder, case: dict) -> None:
    item = item_of(case, QWEN3 / "media")
    processed = qwen3.processor(as_item(item))
    assert processed.input_ids.tolist() == QWEN3_EXPECTED[f"input_ids/{case['id']}"].reshape(-1).tolist()
    expected = QWEN3_EXPECTED.get(f"position_ids/{case['id']}")
    if expected is not None:
        assert np.array_equal(processed.tokens.positions, expected.reshape(3, -1).numpy())
    assert qwen3.processor.measure(as_item(item))[1] == len(processed.input_ids)
    row = QWEN3_EXPECTED["normalized"][QWEN3_ROWS.index(case["id"])].numpy()
    assert np.abs(qwen3.encode([item])[0] - row).max() < 1e-5


def test_qwen3_vl_embedding_in_company(qwen3: Embedder) -> None:
    few = [case for case in QWEN3_CASES if not case.get("fallback") and len(case["item"].get("video", [])) < 20]
    rows = QWEN3_EXPECTED["normalized"][[QWEN3_ROWS.index(case["id"]) for case in few]].numpy()
    assert np.abs(qwen3.encode([item_of(case, QWEN3 / "media") for case in few]) - rows).max() < 1e-5


@pytest.mark.parametrize("case", [c for c in QWEN3_CASES if c.get("fallback")], ids=lambda c: c["id"])
def test_what_the_script_replaces_silently_is_an_error_here(qwen3: Embedder, case: dict) -> None:
    with pytest.raises(DataError, match=r"aspect ratio is above 200|need one size"):
        qwen3.encode([item_of(case, QWEN3 / "media")])


@pytest.fixture(scope="module")
def cut(qwen3_folder: Path) -> Embedder:
    return Embedder.from_pretrained(qwen3_folder, prompt="qwen3_vl_embedding", dtype="float32", max_length=64)


@pytest.mark.parametrize("case", cases_of(QWEN3, "max_length_64"), ids=lambda c: c["id"])
def test_long_prompts_are_cut_on_the_right(cut: Embedder, case: dict) -> None:
    row = QWEN3_EXPECTED["normalized"][QWEN3_ROWS.index(case["id"])].numpy()
    assert np.abs(cut.encode([item_of(case, QWEN3 / "media")])[0] - row).max() < 1e-5


def test_media_are_never_cut(qwen3_folder: Path) -> None:
    model = Embedder.from_pretrained(qwen3_folder, prompt="qwen3_vl_embedding", dtype="float32", max_length=20)
    with pytest.raises(DataError, match="tokens of max_length; raise max_length"):
        model.encode([{"image": QWEN3 / "media" / "wide.png"}])


@pytest.fixture(scope="module")
def appending(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Embedder]:
    """Models by their max_length, whose tokenizer adds an end token."""
    from tokenizers.processors import Sequence, TemplateProcessing

    folder = shutil.copytree(qwen3_folder, tmp_path_factory.mktemp("appending") / "model")
    tokenizer = load_tokenizer(folder)
    template = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 151643)])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = Sequence([backend.post_processor, template]) if backend.post_processor else template
    tokenizer.save_pretrained(folder)
    options: dict[str, Any] = {"prompt": "qwen3_vl_embedding", "dtype": "float32"}
    return {length: Embedder.from_pretrained(folder, max_length=length, **options) for length in (64, 8192)}


@pytest.mark.parametrize("case", cases_of(QWEN3, "appended_endoftext"), ids=lambda c: c["id"])
def test_a_tokenizer_that_adds_an_end_token(appending: dict[int, Embedder], case: dict) -> None:
    model = appending[64 if "64" in case["id"] else 8192]
    item = item_of(case, QWEN3 / "media")
    ids = model.processor(as_item(item)).input_ids
    assert ids.tolist() == QWEN3_EXPECTED[f"input_ids/{case['id']}"].reshape(-1).tolist()
    row = QWEN3_EXPECTED["normalized"][QWEN3_ROWS.index(case["id"])].numpy()
    assert np.abs(model.encode([item])[0] - row).max() < 1e-5


GME_EXPECTED = load_file(GME / "expected.safetensors")


@pytest.mark.parametrize("case", cases_of(GME, "cases"), ids=lambda c: f"{c['id']}-{c['min_tokens']}")
def test_gme(tmp_path_factory: pytest.TempPathFactory, gme: dict[int, Embedder], case: dict) -> None:
    item = item_of(case, GME)
    if "image" in item:
        item["image"] = GME / "images" / Path(case["item"]["image"]).name
    if not case["item"].get("is_query", True):
        item.pop("instruction", None)  # documents ignore it
    model = gme[case["min_tokens"]]
    if "image_grid_thw" in case:
        (visual,) = model.processor(as_item(item)).visuals
        assert [list(visual.grid)] == case["image_grid_thw"]
        width, height = Still(item["image"]).open().size
        assert list(gme_first_size(height, width))[::-1] == case["first_resize"]
    row = GME_EXPECTED[f"normalized/min{case['min_tokens']}/{case['id']}"].reshape(-1).numpy()
    assert np.abs(model.encode([item])[0] - row).max() < 1e-5


@pytest.fixture(scope="module")
def gme(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Embedder]:
    folder = checkpoint(tmp_path_factory.mktemp("gme"))
    return {
        tokens: Embedder.from_pretrained(folder, prompt="gme", dtype="float32", min_pixels=tokens * 784)
        for tokens in (4, 256)
    }


def test_gme_in_batches_of_texts_and_of_images(gme: dict[int, Embedder]) -> None:
    """What its script gets right in a batch; mixed batches, which it does not, are one of `test_gme`'s items each."""
    tree = json.loads((GME / "cases.json").read_text())
    cases = {case["id"]: case for case in tree["cases"] if case["min_tokens"] == 4}
    for batch in (one for one in tree["batches"] if one["id"] in ("texts", "pictures")):
        items = [item_of(cases[name], GME) for name in batch["items"]]
        for item, name in zip(items, batch["items"], strict=True):
            if "image" in item:
                item["image"] = GME / "images" / Path(cases[name]["item"]["image"]).name
        rows = GME_EXPECTED[f"batch/{batch['id']}"].numpy()
        assert np.abs(gme[4].encode(items) - rows).max() < 1e-5


def test_gme_cuts_the_end_of_long_texts(tmp_path: Path) -> None:
    case = json.loads((GME / "cases.json").read_text())["max_length_60"]
    model = Embedder.from_pretrained(checkpoint(tmp_path), prompt="gme", dtype="float32", max_length=60)
    ids = model.processor(as_item(case["text"])).input_ids
    assert len(ids) == 60 and ids[-1] != 151643
    row = GME_EXPECTED["normalized/max_length_60"].reshape(-1).numpy()
    assert np.abs(model.encode([case["text"]])[0] - row).max() < 1e-5


TILES = json.loads((INTERNVL / "tiles.json").read_text())
PROMPTS = json.loads((INTERNVL / "prompts.json").read_text())


def test_internvl_tile_grids() -> None:
    for size in TILES["sizes"]:
        assert tile_grid(size["width"], size["height"]) == (size["columns"], size["rows"]), size


@pytest.fixture(scope="module")
def internvl_processor(tmp_path_factory: pytest.TempPathFactory) -> InternVLProcessor:
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    added = PROMPTS["added_tokens"]
    tokenizer.add_tokens(sorted(added, key=added.get), special_tokens=True)
    return InternVLProcessor(tokenizer, Settings(prompt="b3_internvl"))


@pytest.mark.parametrize("case", TILES["pictures"], ids=lambda c: c["image"])
def test_internvl_tiles(internvl_processor: InternVLProcessor, case: dict) -> None:
    visual = internvl_processor.visual(Still(INTERNVL / "images" / case["image"]))
    assert visual.grid[0] == case["tiles"]
    tiles = tiles_of(torch.from_numpy(visual.patches), 448, 14)
    assert hashlib.sha256(tiles.numpy().tobytes()).hexdigest() == case["uint8_sha256"]
    pixels = pixels_of(tiles)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == case["float32_sha256"]
    words = pixels.bfloat16().view(torch.int16).numpy()
    assert hashlib.sha256(words.tobytes()).hexdigest() == case["bfloat16_sha256"]


@pytest.mark.parametrize("case", PROMPTS["cases"], ids=lambda c: c["id"])
def test_b3_internvl_prompts(internvl_processor: InternVLProcessor, case: dict) -> None:
    image = INTERNVL / "images" / case["image"] if case["image"] else None
    ids = load_file(INTERNVL / "prompts.safetensors")[f"input_ids/{case['id']}"].reshape(-1)
    assert internvl_processor(Item(case["text"], image)).input_ids.tolist() == ids.tolist()


def test_internvl_under_the_names_of_later_files(tmp_path: Path) -> None:
    """Files of 2025 name the towers inside `model`; both give the same weights."""
    source = shutil.copytree(INTERNVL / "tiny-internvl-hf", tmp_path / "later")
    weights = load_file(source / "model.safetensors")
    later = {key.replace("language_model.model.", "language_model.") for key in weights}
    assert len(later) == len(weights)
    named = {
        key.removeprefix("language_model.") if "lm_head" in key
        else f"model.{key.replace('language_model.model.', 'language_model.')}": value
        for key, value in weights.items()
    }  # fmt: skip
    save_file(named, source / "model.safetensors")
    one, other = (
        InternVL.load(folder, torch.float32, torch.device("cpu"), "sdpa").state_dict()
        for folder in (INTERNVL / "tiny-internvl-hf", source)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_internvl_hidden_states() -> None:
    expected = load_file(INTERNVL / "hidden_states.safetensors")
    network = InternVL.load(INTERNVL / "tiny-internvl-hf", torch.float32, torch.device("cpu"), "sdpa")
    model = InternVL(network, None)  # type: ignore[arg-type]
    ids = [expected[f"input_ids/{row}"].reshape(-1).long() for row in range(5)]
    features = [
        model.core.get_image_features(
            expected[f"pixel_values/{row}"], vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output.flatten(0, 1)
        for row in range(1, 5)
    ]
    for row, rows in enumerate(features, start=1):
        assert (rows - expected[f"image_features/{row}"].reshape(rows.shape)).abs().max() < 1e-4
    packed = torch.cat(ids)
    batch = Batch(packed, [len(row) for row in ids], slots=(packed == 290).nonzero()[:, 0])
    vectors = model(batch, features=torch.cat(features))
    normalized = torch.stack([expected[f"normalized/{row}"].reshape(-1) for row in range(5)])
    assert (vectors - normalized).abs().max() < 1e-5


def test_the_name_of_a_published_model_brings_its_rule(
    qwen3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "Qwen3-VL-Embedding-2B"
    folder.symlink_to(qwen3_folder)
    model = Embedder.from_pretrained(folder, dtype="float32")
    assert model.settings.prompt == "qwen3_vl_embedding"
    assert (model.settings.positions, model.settings.max_frames, model.settings.max_length) == ("mrope", 64, 8192)
    assert "is read with prompt qwen3_vl_embedding" in capsys.readouterr().err
    plain = Embedder.from_pretrained(folder, dtype="float32", prompt="plain")
    assert (plain.settings.prompt, plain.settings.positions) == ("plain", "1d")


@pytest.mark.parametrize("prompt", ["qwen3_vl_embedding", "gme"])
def test_a_chat_rule_leaves_out_marks_of_media(qwen3_folder: Path, prompt: str) -> None:
    """Rows of MMEB and of a user's own file say where an image goes; a text without media stays as it is."""
    model = Embedder.from_pretrained(qwen3_folder, dtype="float32", prompt=prompt)
    image = QWEN3 / "media" / "wide.png"
    marked, plain = (
        model.processor(Item(text, image, instruction="Find it.")) for text in ("<|image_1|>\na cat", "a cat")
    )
    assert marked.input_ids.tolist() == plain.input_ids.tolist()
    text = model.processor(Item("<|image_1|>\na cat")).input_ids
    assert len(text) > len(model.processor(Item("a cat")).input_ids)


def test_a_rule_of_another_backbone_is_refused(qwen3_folder: Path) -> None:
    with pytest.raises(InputError, match="prompt 'b3_internvl' is not for Qwen3-VL; use one of plain"):
        Embedder.from_pretrained(qwen3_folder, prompt="b3_internvl")
    with pytest.raises(InputError, match="prompt 'chat' is not known; use one of plain, vlm2vec"):
        Embedder.from_pretrained(qwen3_folder, prompt="chat")
