"""Damaged inputs that `tests/hardening/mutate_inputs.py` has found to end in a traceback: now one line each."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import GOLDEN, checkpoint

from b3 import Embedder
from b3.data.archives import members
from b3.data.datasets import load_pairs
from b3.data.images import FolderImages
from b3.data.items import Item, as_item
from b3.errors import DataError, InputError
from b3.files import sha256
from b3.mining import mine
from b3.mining.plan import BatchPlan
from b3.mining.teacher import load_matrix
from b3.model.adapter import read_adapter
from b3.model.prompts import prompt_rule
from b3.model.settings import Settings


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"text": 5}, "text or instruction '5'; it has to be a string"),
        ({"text": ["a", None]}, "it has to be a string"),
        ({"text": "a", "instruction": {"b": 1}}, "it has to be a string"),
        ({"text": "a", "image": 3}, "the image '3'; give a path"),
        ({"text": "a", "image": {"path": 3}}, "give a path, encoded bytes"),
        ({"text": "a", "video": 7}, "the video '7'; give a folder"),
        ({"text": "\ud800"}, "not valid Unicode"),
    ],
)
def test_an_item(item: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        as_item(item)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1/0 }}", "cannot be filled .division by zero"),
        ("{% for i in range(10**9) %}x{% endfor %}", "operator .* is not for prompts"),
        ("{% for i in range(999999) %}x{% endfor %}", "cannot be filled .*Range too big"),
        ("{{ 'x' * 10000000000 }}", "operator . is not for prompts"),
        ("{{ text", "not valid jinja"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template(template: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        prompt_rule(template).parts(Item("hello"), "<i>", "<v>")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_pixels", "many"),
        ("prompt", ["plain"]),
        ("dim", {}),
        ("max_length", 1.5),
        ("fps", None),
        ("positions", True),
    ],
)
def test_a_setting(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{setting} .* is not of type"):
        Settings(**{setting: value})


@pytest.mark.parametrize(("key", "value"), [("r", []), ("lora_alpha", None), ("r", 0), ("lora_alpha", True)])
def test_an_adapter(tmp_path: Path, key: str, value: Any) -> None:
    shutil.copytree(GOLDEN / "adapter-dora", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"{key} is .*, not a positive number"):
        read_adapter(tmp_path / "a")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def other_header(content: bytes) -> bytes:
    return content.replace(b"'shape'", b"'shap\xff")


def unclosed_header(content: bytes) -> bytes:
    return content.replace(b"}", b"(", 1)


@pytest.mark.parametrize("damage", [cut, other_header, unclosed_header])
def test_an_array(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    np.save(tmp_path / "q.npy", np.ones((8, 4), dtype="float32"))
    (tmp_path / "q.npy").write_bytes(damage((tmp_path / "q.npy").read_bytes()))
    with pytest.raises(DataError, match=r"is not an \.npy file"):
        load_matrix(tmp_path / "q.npy")


@pytest.mark.parametrize("damage", [cut, unclosed_header, lambda content: content.replace(b"<i8", b"<f8")])
def test_a_plan_whose_checksums_were_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    vectors = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
    mine(vectors, vectors, p=2, m=8, community_size=4).save(tmp_path / "plan")
    file, manifest = tmp_path / "plan" / "communities.npy", tmp_path / "plan" / "manifest.json"
    file.write_bytes(damage(file.read_bytes()))
    facts = json.loads(manifest.read_text())
    facts["sha256"]["communities.npy"] = sha256(file)
    manifest.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"communities.npy (is no array|has shape .* not a plan's)"):
        BatchPlan.load(tmp_path / "plan")


def test_a_member_without_a_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        opened.writestr(zipfile.ZipInfo("a"), b"1")
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(content.replace(b"a", b"\0"))
    with pytest.raises(InputError, match="member '' has no name"):
        members(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("model.safetensors", cut, "cannot be loaded"),
        ("model.safetensors", lambda content: content[:8] + b"\xff" + content[9:], "cannot be loaded"),
        ("tokenizer.json", lambda content: content.replace(b'"vocab":', b'"vocab": 1, "x":', 1), "no tokenizer"),
        ("config.json", lambda content: b"[]", "holds no JSON object"),
        (
            "config.json",
            lambda content: content.replace(b'"vocab_size": ', b'"vocab_size": "x", "y": ', 1),
            "cannot be",
        ),
    ],
)
def test_a_checkpoint(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], problem: str) -> None:
    folder = checkpoint(tmp_path)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(InputError, match=problem):
        Embedder.from_pretrained(folder, dtype="float32", device="cpu")


def test_rows_that_are_not_utf_8(tmp_path: Path) -> None:
    row = {"qry": "q", "qry_image_path": "", "pos_text": "t", "pos_image_path": ""}
    (tmp_path / "pairs.jsonl").write_bytes(json.dumps(row).encode().replace(b'"q"', b'"\xff"'))
    with pytest.raises(DataError, match=r"pairs.jsonl cannot be read as jsonl .*[Ii]nvalid UTF8"):
        load_pairs(f"jsonl:{tmp_path / 'pairs.jsonl'}", "pairs")


@pytest.mark.parametrize("line", ["null", "3", "[]", '"a"', "{broken"])
def test_a_line_that_is_no_object(tmp_path: Path, line: str) -> None:
    """A line `null` ends pyarrow, and the process with it."""
    row = {"qry": "q", "qry_image_path": "", "pos_text": "t", "pos_image_path": ""}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n\n{line}\n{json.dumps(row)}\n")
    problem = "cannot be read as jsonl" if line == "{broken" else "line 3 is no JSON object"
    with pytest.raises(DataError, match=problem):
        load_pairs(f"jsonl:{tmp_path / 'pairs.jsonl'}", "pairs")


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"])
def test_the_name_of_an_image(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a path; correct the row"):
        FolderImages(tmp_path).read(name)
