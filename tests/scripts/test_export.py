"""An export is a whole model with the vectors of its run, for b3 and for transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from b3 import Embedder, registry
from scripts import export

TEXTS = ["a red disc", "what is number 3 ?", "a blue frame number 12"]


@pytest.mark.parametrize("kind", [k for k in registry.BACKBONES if k not in ("b3_heads", "roberta", "xlm-roberta")])
def test_an_export_has_the_vectors_of_its_adapter(tmp_path: Path, kind: str) -> None:
    base = registry.load("backbone", kind).tiny(tmp_path / "base", TEXTS, 0)
    adapter = tiny.write_adapter(base, tmp_path / "run")
    bare = Embedder.from_pretrained(base, dtype="float32").encode(TEXTS)
    run = Embedder.from_pretrained(base, adapter, dtype="float32").encode(TEXTS)
    assert np.abs(run - bare).max() > 1e-3
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        arguments = ["--model", str(adapter), "--out", str(out), "--dtype", dtype]
        assert export.main(arguments) == 0
        assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}
        expected = Embedder.from_pretrained(base, adapter, dtype=dtype).encode(TEXTS)
        assert np.abs(Embedder.from_pretrained(out, dtype=dtype).encode(TEXTS) - expected).max() < 1e-6


def test_transformers_loads_it_and_dim_travels(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    base = tiny.write_text_model(tmp_path / "base", "bert")
    arguments = ["--model", str(base), "--out", str(tmp_path / "out"), "--dtype", "float32", "--dim", "16"]
    assert export.main(arguments) == 0
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModel, AutoTokenizer))
    vectors = []
    with torch.inference_mode():
        for text in TEXTS:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)[:16]
            vectors.append((hidden / hidden.norm()).numpy())
    ours = Embedder.from_pretrained(tmp_path / "out", dtype="float32").encode(TEXTS)
    assert ours.shape == (3, 16) and np.abs(ours - np.stack(vectors)).max() < 2e-6
    assert 'SentenceTransformer("' in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert export.main(["--model", "nothing/there", "--out", str(tmp_path / "out")]) == 2
    assert "is not empty; choose another --out" in capsys.readouterr().err


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert export.main(["--model", "anything", "--out", str(tmp_path / "out")]) == 2
    assert "an export is one process; start it without torchrun" in capsys.readouterr().err
