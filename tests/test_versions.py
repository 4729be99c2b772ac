"""The comparison of `hardening/versions.py` sees what differs."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "hardening" / "versions.py"
SPEC = importlib.util.spec_from_file_location("versions", FILE)
assert SPEC is not None and SPEC.loader is not None
versions: Any = importlib.util.module_from_spec(SPEC)
sys.modules["versions"] = versions
SPEC.loader.exec_module(versions)


def write(folder: Path, **changes: Any) -> Path:
    values = {"loss": 1.5, "pixel": 7, "member": 3, "weight": 0.25, "acc": 0.5, "text": "a", **changes}
    for name in ("golden/pixels", "mining/plan", "training/run", "evaluation-v1/out"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "golden" / "pixels" / "a.npy", np.array([[1, values["pixel"]]], dtype=np.uint8))
    np.save(folder / "mining" / "plan" / "communities.npy", np.array([[0, values["member"]]]))
    save_file({"w": np.array([1.0, values["weight"]], np.float32)}, folder / "training" / "run" / "a.safetensors")
    lines = [{"loss": values["loss"], "seconds": time.monotonic(), "name": values["text"]}, {"loss": None}]
    (folder / "training" / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = json.dumps({"acc": values["acc"], "versions": {"numpy": str(folder)}})
    (folder / "evaluation-v1" / "out" / "a_score.json").write_text(score)
    return folder


@pytest.mark.parametrize(
    ("changes", "kind", "largest"),
    [
        ({"pixel": 9}, "pixels", 2),
        ({"member": 4}, "plans", 1),
        ({"weight": 0.5}, "weights", 0.25),
        ({"loss": 1.75}, "losses and metrics", 0.25),
        ({"loss": float("nan")}, "losses and metrics", np.inf),
        ({"acc": 0.75}, "scores", 0.25),
        ({"text": "b"}, "texts", np.inf),
    ],
)
def test_one_difference_is_in_its_line(tmp_path: Path, changes: dict[str, Any], kind: str, largest: float) -> None:
    lines = versions.compare(write(tmp_path / "one"), write(tmp_path / "other", **changes))
    assert {name for name, line in lines.items() if line.differing} == {kind}
    line = lines[kind]
    assert line.differing == 1
    assert line.largest == largest > versions.MOST[kind]


def test_equal_runs_differ_nowhere(tmp_path: Path) -> None:
    lines = versions.compare(write(tmp_path / "one"), write(tmp_path / "other"))
    assert not any(line.differing for line in lines.values())
    assert {kind: line.count for kind, line in lines.items() if line.count} == {
        "pixels": 2, "plans": 2, "weights": 2, "losses and metrics": 1, "scores": 1, "texts": 2,
    }  # fmt: skip


def test_a_file_that_one_lacks_is_a_difference(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    (other / "mining" / "plan" / "communities.npy").unlink()
    assert versions.compare(one, other)["plans"].differing == 2
