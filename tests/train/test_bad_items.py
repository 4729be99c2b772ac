"""Bad models, prompts, adapters and rows end a run with one line that names data set, row and path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image

import train
from b3 import Embedder, registry
from b3.console import no_bars
from b3.errors import InputError

ROW = {"qry": "what?", "qry_image_path": [], "qry_video_path": None, "pos_text": "red", "pos_image_path": ""}
QWEN3 = ["model.name={root}/qwen3_vl", "model.prompt=qwen3_vl_embedding"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    for name in ("empty", "long"):
        (root / "images" / name).mkdir(parents=True)
    for i in range(9):
        Image.new("RGB", (56, 56), (20 * i, 0, 0)).save(root / "images" / "long" / f"{i}.png")
    Image.new("RGB", (84, 56)).save(root / "images" / "wide.png")
    (root / "images" / "torn.png").write_bytes(tiny.image("red", "disc", 0)[:60])
    with no_bars():
        for kind in ("qwen2_vl", "qwen3_vl", "internvl", "roberta"):
            registry.load("backbone", kind).tiny(root / kind, ["red disc what is this number 0123456789"] * 4)
    shutil.copytree(root / "qwen2_vl", root / "unknown")
    (root / "unknown" / "config.json").write_text('{"model_type": "mixtral"}')
    assert run(root, {}) == 0
    return root


def run(root: Path, row: dict[str, Any], *overrides: str) -> int:
    """Train on twelve rows, the sixth of which is `row`; its exit code."""
    rows: list[dict[str, Any]] = [{**ROW, "qry": f"what {i}?", "pos_text": f"red {i}"} for i in range(12)]
    rows[5] |= row
    (root / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "bad",
        "output_dir": str(root / ("bad" if row or overrides else "adapter")),
        "model": {"name": str(root / "qwen2_vl"), "dtype": "float32", "prompt": "vlm2vec"},
        "adapter": {"r": 2, "use_dora": False, "dropout": 0.0},
        "data": {
            "source": f"jsonl:{root}/own.jsonl",
            "image_dir": str(root / "images"),
            "datasets": [{"subset": "own"}],
        },
        "mining": {"dir": str(root / "plans"), "teacher": str(root / "teacher")},
        "batch": {"size": 12, "policy": "random"},
        "train": {"steps": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return train.main([str(root / "recipe.yaml"), *(override.format(root=root) for override in overrides)])


def check(
    root: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], overrides: list[str], *words: str
) -> None:
    shutil.rmtree(root / "bad", ignore_errors=True)
    capsys.readouterr()
    assert run(root, row, *overrides) == 2
    text = capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text
    for word in words:
        assert word.format(root=root) in line, line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name={root}/unknown"], ["{root}/unknown/config.json has model_type 'mixtral'; supported: qwen2_vl",
                                         "a line 'mixtral': ... in b3/registry.py"]),
        (["model.prompt=b3_internvl"], ["prompt 'b3_internvl' is not for Qwen2-VL; use one of plain, vlm2vec"]),
        (["model.name={root}/internvl", "model.prompt=gme"], ["prompt 'gme' is not for InternVL"]),
        (["model.name={root}/roberta", "model.prompt=gme"], ["prompt 'gme' is not for text encoders"]),
        (["model.name={root}/internvl", "model.init_adapter={root}/adapter"],
         ["the adapter in {root}/adapter was trained on qwen2_vl (base {root}/qwen2_vl)", "internvl is internvl"]),
    ],
)  # fmt: skip
def test_models(root: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]) -> None:
    check(root, capsys, {}, overrides, *words)


@pytest.mark.parametrize(
    ("row", "overrides", "words"),
    [
        ({"qry_video_path": "empty"}, [], ["video {root}/images/empty has no frames"]),
        ({"qry_video_path": "none"}, [], ["video {root}/images/none does not exist"]),
        ({"qry_video_path": "long"}, [*QWEN3, "model.max_length=60"],
         ["9 frames from {root}/images/long/0.png", "of the 60 tokens of max_length", "lower max_pixels or max_fr"]),
        ({"qry_video_path": ["long/0.png", "wide.png"]}, QWEN3,
         ["2 frames from long/0.png: frame 2 is 84 x 56, the first 56 x 56; frames of a video need one size"]),
        ({"qry_video_path": "long"}, ["model.prompt=gme"], ["prompt rule 'gme' reads no videos"]),
        ({"qry_image_path": ["wide.png"]}, ["model.name={root}/roberta", "model.prompt=null"],
         ["image wide.png: the backbone is a text encoder and reads no images"]),
        ({"qry_image_path": ["wide.png", "gone.png"]}, [], ["image 'gone.png' is not in {root}/images"]),
        ({"qry_image_path": ["wide.png", "torn.png"]}, [], ["image torn.png in {root}/images does not decode"]),
        ({"qry_image_path": ["wide.png", "wide.png"], "qry": "<|image_1|>"}, ["model.prompt=plain"],
         ["a text with 2 images and 0 videos needs each of <|image_1|>"]),
    ],
)  # fmt: skip
def test_rows(
    root: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], overrides: list[str], words: list[str]
) -> None:
    check(root, capsys, row, overrides, "own row 5: ", *words)


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl", "roberta"])
def test_an_adapter_of_another_backbone_is_refused(root: Path, tmp_path: Path, kind: str) -> None:
    """Layers of all tiny models have the same names and shapes; config.json or the base's name tells them apart."""
    message = rf"was trained on qwen2_vl \(base .*\), and {root / kind} is {kind}; take the backbone"
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(root / kind, adapter=root / "adapter", dtype="float32")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(root / "adapter" / "adapter_model.safetensors", bare)
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen2-VL-2B-Instruct"
    (bare / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(root / kind, adapter=bare, dtype="float32")
    Embedder.from_pretrained(root / "qwen2_vl", adapter=bare, dtype="float32")
    config["base_model_name_or_path"] = "someone/a-tuned-model"
    (bare / "adapter_config.json").write_text(json.dumps(config))
    Embedder.from_pretrained(root / "qwen2_vl", adapter=bare, dtype="float32")
