"""Every recipe at its real size as fake tensors: what it needs of its card, and what a run says it will need."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from b3.config import load_config
from benchmarks.shapes import CHECKPOINTS, FOLDER, at_size, measure, whole, why_not

ROOT = Path(__file__).parents[2]
CARD = 80e9  # bytes that every recipe of configs/ may count on: an 80 GB card, 8 to a node
SHARE = 0.9
CONTEXT = 2e9  # CUDA's context, NCCL and cuBLAS; not tensors
VISION = r"adapter.target_modules='.*\.(q_proj|k_proj|v_proj|o_proj|down_proj|attn\.qkv|attn\.proj|fc1|fc2)'"
GATED = "adapter.target_modules=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
TEXT = {"length": 24, "grid": None}
TILES = {"length": 13 * 256 + 60, "grid": (13 * 32, 32)}  # 12 tiles and the thumbnail, each 32 x 32 patches

# Further kinds of training, at the width of 2B (a text encoder: of RoBERTa-large), of a few layers.
KINDS: dict[str, tuple[str, list[str]]] = {
    "DoRA": ("b3_qwen2vl_2b", ["adapter.dropout=0"]),
    "LoRA": ("b3_qwen2vl_2b", ["adapter.use_dora=false", "adapter.dropout=0"]),
    "DoRA, gate and up, dropout": ("b3_v2_qwen2vl_2b", [GATED]),
    "DoRA, gate and up": ("b3_v2_qwen2vl_2b", [GATED, "adapter.dropout=0"]),
    "LoRA, gate and up": ("b3_v2_qwen2vl_2b", [GATED, "adapter.use_dora=false", "adapter.dropout=0"]),
    "LoRA, gate and up, dropout": ("b3_v2_qwen2vl_2b", [GATED, "adapter.use_dora=false"]),
    "Qwen3-VL, DoRA, gate and up": ("b3_qwen3vl_2b", [GATED]),
    "checkpointing": ("b3_qwen2vl_2b", ["model.gradient_checkpointing=true"]),
    "adapter in the tower": ("b3_qwen2vl_2b", [VISION]),
    "full, tower frozen": ("b3_qwen2vl_2b", ["model.train=full", "model.freeze=[visual]"]),
    "full": ("b3_qwen2vl_2b", ["model.train=full"]),
    "full, checkpointing": ("b3_qwen2vl_2b", ["model.train=full", "model.gradient_checkpointing=true"]),
    "Qwen3-VL, LoRA": ("b3_qwen3vl_2b", ["adapter.use_dora=false", "adapter.dropout=0"]),
    "Qwen3-VL, full, tower frozen": ("b3_qwen3vl_2b", ["model.train=full", "model.freeze=[visual]"]),
    "InternVL, LoRA": ("b3_internvl3_2b", ["adapter.use_dora=false", "adapter.dropout=0"]),
    "InternVL, full, tower frozen": ("b3_internvl3_2b", ["model.train=full", "model.freeze=[vision_tower, projector]"]),
    "text encoder, checkpointing": ("text_nli_roberta_b3", ["model.gradient_checkpointing=true"]),
}
# Three layers of linear attention and one of full attention, without images.
HYBRID = "model.name=Qwen/Qwen3.5-9B"
HYBRIDS: dict[str, list[str]] = {
    "Qwen3.5, DoRA and dropout": [HYBRID],
    "Qwen3.5, LoRA": [HYBRID, "adapter.use_dora=false", "adapter.dropout=0"],
    "Qwen3.5, full": [HYBRID, "model.train=full", "model.freeze=[visual]"],
}
pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"shapes on a claimed GPU: {why_not()}")


def recipes() -> dict[str, str]:
    """A recipe for each distinct way to use memory among those of configs/, by what tells them apart."""
    distinct: dict[str, str] = {}
    for file in [*sorted(ROOT.glob("configs/*.yaml")), *sorted(ROOT.glob("configs/*/*.yaml"))]:
        if "model" not in yaml.safe_load(file.read_text()) and "base" not in yaml.safe_load(file.read_text()):
            continue  # of another program
        config = load_config(file, [])
        if config.model.name in CHECKPOINTS:
            keys = [config.model, config.adapter, config.train.chunk_tokens, config.train.bf16]
            distinct.setdefault(json.dumps([str(key) for key in keys]), str(file))
    return distinct


def case(recipe: str, overrides: list[str]) -> dict[str, Any]:
    special = TEXT if "roberta" in recipe else TILES if "internvl" in recipe else {}
    return {"recipe": recipe, "overrides": overrides, **special}


def depths(recipe: str) -> tuple[int, int]:
    facts = json.loads((FOLDER / CHECKPOINTS[load_config(recipe, []).model.name]).read_text())
    vision = facts.get("vision_config", {})
    text = facts.get("text_config", facts)
    return text["num_hidden_layers"], vision.get("depth", vision.get("num_hidden_layers", 0))


@cache
def measured() -> tuple[dict[str, Any], dict[str, Any], tuple[Any, Any]]:
    """(recipes at full size, kinds of training, a deeper model measured and continued from shallower ones)."""
    files = list(recipes().values())
    groups = [at_size(*depths(file), **case(file, [])) for file in files]
    kinds = [
        {**case(str(ROOT / f"configs/{name}.yaml"), overrides), "layers": 4, "vision_layers": 1}
        for name, overrides in KINDS.values()
    ]
    recipe = str(ROOT / "configs/b3_qwen2vl_2b.yaml")
    kinds += [
        {"recipe": recipe, "overrides": overrides, "length": 448, "grid": None, "layers": 4, "vision_layers": 1}
        for overrides in HYBRIDS.values()
    ]
    few = at_size(5, 4, **case(str(ROOT / "configs/b3_qwen2vl_2b.yaml"), ["model.train=full"]))
    deep = {**few[0], "layers": 5, "vision_layers": 4}
    results = iter(measure([*(c for group in groups for c in group), *kinds, *few, deep]))
    by_recipe = {
        file: whole([next(results) for _ in group], *depths(file)) for file, group in zip(files, groups, strict=True)
    }
    by_kind = {name: next(results) for name in (*KINDS, *HYBRIDS)}
    continued = whole([next(results) for _ in few], 5, 4)
    return by_recipe, by_kind, (continued, next(results))


def test_memory_and_operations_are_linear_in_the_layers() -> None:
    """So that a few layers tell the numbers of all; the tower trained as well, for the slope of its layers."""
    continued, deep = measured()[2]
    for key in ("weights", "states", "kept", "activations", "told"):
        assert continued[key] == pytest.approx(deep[key], rel=0.01), key
    for name, kernels in deep["parts"].items():
        for kind, numbers in kernels.items():
            assert continued["parts"][name][kind] == pytest.approx(numbers, rel=0.01), (name, kind)


@pytest.mark.parametrize("file", recipes().values(), ids=lambda file: Path(file).stem)
def test_a_recipe_fits_its_card_with_room(file: str) -> None:
    told = measured()[0][file]
    config = load_config(file, [])
    features = 0 if "roberta" in config.model.name else config.train.vision_cache_mib * 2**20
    peak = told["weights"] + told["states"] + told["activations"] + features + CONTEXT
    print(f"{Path(file).stem}: weights {told['weights'] / 1e9:.1f}, states {told['states'] / 1e9:.1f}, chunk"
          f" {told['activations'] / 1e9:.1f}, features {features / 1e9:.1f}, peak {peak / 1e9:.1f} GB")  # fmt: skip
    assert peak < SHARE * CARD
    check_told(told)


@pytest.mark.parametrize("kind", [*KINDS, *HYBRIDS])
def test_a_run_says_what_memory_it_will_need(kind: str) -> None:
    check_told(measured()[1][kind])


def check_told(run: dict[str, Any]) -> None:
    """What a chunk adds, as told, against the shapes; weights, gradients and moments are counted exactly."""
    print(f"activations {run['activations'] / 1e9:.2f} GB, told {run['told'] / 1e9:.2f}")
    assert run["told"] == pytest.approx(run["activations"], rel=0.15)
