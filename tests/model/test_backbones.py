"""What every vision-language backbone of the registry must do, on its own tiny version."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from b3 import Embedder, registry
from b3.data.items import Item, as_item
from b3.errors import DataError
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.batch import collate
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import info_nce
from b3.train.step import CachedStep

KINDS = [name for name in registry.BACKBONES if registry.load("backbone", name).reads_images]
TEXTS = ["a red square number", "a blue circle on a lamp", "house, tree and river; the cat sleeps"] * 20
POSITIONS = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), ("1d", "mrope"))
MODES = [(kind, positions) for kind in KINDS for positions in POSITIONS.get(kind, ("1d",))]


def noise(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


FILM = [noise(20 + i, 70, 90) for i in range(5)]
ITEMS: list[dict[str, Any]] = [
    {"text": "a red square"},
    {"text": "<|image_1|> number", "image": noise(1, 100, 60)},
    {"text": "the cat <|image_2|> and <|image_1|> sleeps", "images": [noise(2, 64, 64), noise(3, 60, 130)]},
    {"text": "<|video_1|> a lamp", "video": FILM},
    {"text": "<|image_1|> river <|video_1|> tree <|image_2|>", "images": [noise(4, 90, 90), noise(5, 56, 56)],
     "video": FILM[:3]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in KINDS:
        made[kind] = registry.load("backbone", kind).tiny(tmp_path_factory.mktemp(kind), TEXTS)
    return made


def load(folders: dict[str, Path], kind: str, positions: str = "1d", **settings: Any) -> Embedder:
    budget = {} if kind == "internvl" else {"positions": positions, "max_pixels": 100 * 100}
    return Embedder.from_pretrained(folders[kind], dtype="float32", **budget, **settings)


@pytest.mark.parametrize(("kind", "positions"), MODES)
def test_alone_and_in_company_give_one_vector(folders: dict[str, Path], kind: str, positions: str) -> None:
    model = load(folders, kind, positions)
    together = model.encode(ITEMS)
    alone = np.concatenate([model.encode([item]) for item in ITEMS])
    assert np.abs(together - alone).max() < 2e-6
    assert np.abs(together @ together.T - np.eye(len(ITEMS))).max() > 1e-3  # not all equal, not all orthogonal
    distances = np.abs(together[:, None] - together[None]).max(axis=2) + np.eye(len(ITEMS))
    assert distances.min() > 1e-4


@pytest.mark.parametrize(("kind", "positions"), MODES)
def test_the_forward_pass_is_upstreams(folders: dict[str, Path], kind: str, positions: str) -> None:
    """Upstream's whole model on one item, with the positions that ours gives it (its own are wrong after a video)."""
    import transformers

    model = load(folders, kind, positions)
    upstream = getattr(transformers, type(model).upstream).from_pretrained(folders[kind], dtype=torch.float32)
    upstream = upstream.eval().model
    for item in ITEMS:
        processed = model.processor(as_item(item))
        ids = torch.from_numpy(processed.input_ids)[None]
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        places = processed.tokens.positions
        axes = np.arange(ids.shape[1])[None].repeat(3, axis=0) if places is None else places
        arguments["position_ids"] = (
            torch.from_numpy(axes)[:, None] if kind != "internvl" else torch.from_numpy(axes)[:1]
        )
        arguments |= pixels_of(model, processed)
        with torch.no_grad():
            hidden = upstream(**arguments).last_hidden_state[0, -1]
        theirs = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        assert np.abs(model.encode([item])[0] - theirs).max() < 1e-5


def pixels_of(model: Embedder, processed: Any) -> dict[str, torch.Tensor]:
    """Upstream's arguments for an item's media: images and videos apart, each in the order of its tokens."""
    if not processed.visuals:
        return {}
    if type(model).__name__ == "InternVL":
        from b3.model.backbones.internvl import pixels_of, tiles_of

        tiles = [tiles_of(torch.from_numpy(v.patches), 56, 14) for v in processed.visuals]
        return {"pixel_values": pixels_of(torch.cat(tiles))}
    arguments = {}
    names = {False: ("pixel_values", "image_grid_thw"), True: ("pixel_values_videos", "video_grid_thw")}
    for is_video, (pixels, grids) in names.items():
        chosen = [v for v in processed.visuals if (v.grid[0] > 1) == is_video]
        if chosen:
            numbers = [model.pixels.numbers(torch.from_numpy(v.patches)) for v in chosen]  # type: ignore[attr-defined]
            arguments[pixels] = torch.cat(numbers)
            arguments[grids] = torch.tensor([v.grid for v in chosen])
    return arguments


def rope_index(model: Embedder, processed: Any) -> np.ndarray:
    """(3, L) positions as transformers builds them from token ids and grids; a frame list has 2 frames per second."""
    core, ids = model.core, torch.from_numpy(processed.input_ids)[None]  # type: ignore[attr-defined]
    kinds = torch.zeros_like(ids)
    for kind, token in ((1, core.config.image_token_id), (2, core.config.video_token_id)):
        kinds[ids == token] = kind
    stills, films = ([v.grid for v in processed.visuals if (v.grid[0] > 1) == is_video] for is_video in (False, True))
    named = {"image_grid_thw": stills, "video_grid_thw": films}
    grids = {name: torch.tensor(grids) for name, grids in named.items() if grids}
    positions: np.ndarray = core.get_rope_index(ids, kinds, **grids)[0][:, 0].numpy()
    return positions


def ours(processed: Any) -> np.ndarray:
    """(3, L) positions of one item."""
    length = len(processed.input_ids)
    places: np.ndarray | None = processed.tokens.positions
    return np.arange(length)[None].repeat(3, axis=0) if places is None else places


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5"])
def test_positions_between_time_stamps_are_upstreams(folders: dict[str, Path], kind: str) -> None:
    model = load(folders, kind, "mrope", prompt="qwen3_vl_embedding")
    for item in ({**item, "text": "a lamp"} for item in ITEMS):
        processed = model.processor(as_item(item))
        assert np.array_equal(ours(processed), rope_index(model, processed))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_text_after_a_video_starts_at_the_largest_position_plus_one(folders: dict[str, Path], kind: str) -> None:
    """transformers 5.x starts earlier, in the middle of the film; else both agree, images included.

    4.52 to 4.57, which the published checkpoints were trained with, do as ours:
    https://github.com/huggingface/transformers/issues/45381.
    """
    model = load(folders, kind, "mrope")
    for item in ITEMS[:3]:
        processed = model.processor(as_item(item))
        assert np.array_equal(ours(processed), rope_index(model, processed))
    film = [noise(40 + i, 56, 56) for i in range(16)]
    processed = model.processor(as_item({"text": "the cat <|video_1|> sleeps", "video": film}))
    mine, theirs = ours(processed), rope_index(model, processed)
    end = int(processed.tokens.slots.max()) + 1
    assert end < mine.shape[1] and np.array_equal(mine[:, :end], theirs[:, :end])
    assert (mine[:, end] == mine[:, :end].max() + 1).all()
    assert (theirs[:, end] < theirs[:, :end].max()).all()  # text shares positions with frames


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5"])
def test_a_video_has_no_outer_pair_of_vision_tokens(folders: dict[str, Path], kind: str) -> None:
    """transformers 5.x expands the token inside a pair into steps with pairs of their own; 4.57 replaced the pair."""
    from types import SimpleNamespace

    from transformers import Qwen3VLProcessor

    model = load(folders, kind, "mrope", prompt="qwen3_vl_embedding")
    processed = model.processor(as_item({"text": "a lamp", "video": FILM[:4]}))
    text = model.processor.tokenizer.decode(processed.input_ids)  # type: ignore[attr-defined]
    upstream = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    upstream.video_token = "<|video_pad|>"
    upstream.vision_start_token, upstream.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    upstream.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    metadata = SimpleNamespace(fps=2.0, frames_indices=[0, 1, 2, 3])
    grids = torch.tensor([visual.grid for visual in processed.visuals])
    steps = upstream.replace_video_token({"video_grid_thw": grids, "video_metadata": [metadata]}, 0)
    assert steps.startswith("<0.2 seconds><|vision_start|><|video_pad|>") and steps in text
    assert text.count("<|vision_start|>") == int(grids[0, 0]) == 2
    assert f"<|vision_start|>{steps}" not in text


class Pairs:
    """Queries are the items, targets are texts."""

    name = "pairs"

    def query(self, row: int) -> Item:
        return as_item(ITEMS[row])

    def target(self, row: int) -> Item:
        return Item(TEXTS[row % 3] + str(row))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [40, 10**6])
def test_the_cached_gradient_is_the_plain_one(folders: dict[str, Path], kind: str, chunk_tokens: int) -> None:
    data, rows = Pairs(), list(range(5))
    gradients = []
    for is_cached in (True, False):
        model = load(folders, kind)
        targets = type(model).adapter_targets
        model.backbone = attach_adapter(
            model.backbone, AdapterSpec(target_modules=targets, dropout=0.0, use_dora=False)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        if is_cached:
            collator = StepCollator([data], model.processor, chunk_tokens)  # type: ignore[list-item]
            CachedStep(model)(collator([(0, row) for row in rows]), 0)
        else:
            sides = [
                torch.cat([model(collate([model.processor(side(row))])) for row in rows])
                for side in (data.query, data.target)
            ]
            scores = (sides[0] @ sides[1].T) / 0.02
            torch.nn.functional.cross_entropy(scores, torch.arange(5)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    trained = [name for name in gradients[0] if gradients[0][name] is not None and "lora_B" in name]
    assert trained and all("language_model" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        scale = max(float(gradients[1][name].abs().max()), 1e-3)
        assert (gradient - gradients[1][name]).abs().max() < 2e-4 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = load(folders, kind, max_frames=4)
    model.save(tmp_path / "copy")
    again = Embedder.from_pretrained(tmp_path / "copy", dtype="float32")
    assert again.settings == model.settings
    assert np.array_equal(again.encode(ITEMS), model.encode(ITEMS))


OLD_NAMES = {  # of adapters saved under transformers 4: (now, then)
    "qwen2_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "qwen2_5_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "internvl": (("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.")),
}


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_adapters_with_old_names_count_in_both_towers(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = load(folders, kind)
    bare = model.encode(ITEMS)
    targets = r".*(language_model.*q_proj|visual.*(attn\.proj|mlp\.down_proj)|vision_tower.*q_proj)"
    model.backbone = attach_adapter(model.backbone, AdapterSpec(target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval().save(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for now, then in OLD_NAMES[kind]:
        assert any(f"base_model.model.{now}" in key for key in tensors)
        tensors = {key.replace(f"base_model.model.{now}", f"base_model.model.{then}"): v for key, v in tensors.items()}
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    old = Embedder.from_pretrained(folders[kind], adapter=tmp_path / "old", dtype="float32")
    assert np.abs(old.encode(ITEMS) - model.encode(ITEMS)).max() < 1e-5
    assert (np.abs(old.encode(ITEMS) - bare).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_its_cost_counts_both_towers(folders: dict[str, Path], kind: str) -> None:
    cost = load(folders, kind).cost()
    assert cost.vision is not None and cost.vision.weights > 0
    assert cost.text.weights > 0 and cost.text.layers == 2 and cost.text.width == 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "no place", "images": [noise(1, 60, 60)]}, "exactly one"),
        ({"text": "<|image_1|>", "images": [noise(1, 60, 60), noise(2, 60, 60)]}, "2 images and 0 videos"),
        ({"text": "<|video_1|>", "video": [[]]}, "a video without frames"),
        ({"text": "x", "instruction": "find"}, "no place for an instruction"),
        ({"text": "x", "picture": "y.png"}, "an item has the key 'picture'; known: text"),
        ({"text": "<|video_1|>", "video": "/does/not/exist"}, "video /does/not/exist does not exist"),
        ({}, "an item needs a text or an image"),
    ],
)
def test_bad_items_are_one_line(folders: dict[str, Path], kind: str, item: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folders, kind).encode([item])


def test_info_nce_is_what_the_step_computes() -> None:
    """The plain gradient above uses torch's cross entropy; it is the loss of the step at its default temperature."""
    queries, targets = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    ours = info_nce(queries, targets, temperature=0.02)
    assert torch.allclose(ours, torch.nn.functional.cross_entropy(queries @ targets.T / 0.02, torch.arange(6)))
