"""ONNX files give onnxruntime the vectors of b3, for items alone and in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from b3 import Embedder
from b3.data.items import Item
from b3.model.backbones.heads import HeadsNetwork, write_heads, write_vectors
from scripts import export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

TEXTS = ["a red disc", "what is number 3 ?", "a", "a blue frame number 12 " * 12, "a green bar", "a red disc"]
CLOSE = 1e-5


def is_close(one: np.ndarray, other: np.ndarray) -> bool:
    """Within `CLOSE`, which a change of 1 % exceeds."""
    noise = np.random.default_rng(0).standard_normal(one.shape).astype(np.float32)
    changed = one + 0.01 * noise * np.abs(one)
    assert np.abs(changed - other).max() > CLOSE, "the comparison tells nothing"
    return bool(np.abs(one - other).max() <= CLOSE)


def session_of(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def run_texts(folder: Path, texts: list[str], side: str = "right") -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    given = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    vectors: np.ndarray = session_of(folder).run(["sentence_embedding"], given)[0]
    return vectors


@pytest.mark.parametrize(("kind", "pooling", "dim"), [("bert", "mean", None), ("roberta", "cls", 16)])
def test_texts_have_our_vectors(tmp_path: Path, kind: str, pooling: str, dim: int | None) -> None:
    base = tiny.write_text_model(tmp_path / "base", kind)
    model = Embedder.from_pretrained(base, dtype="float32", pooling=pooling, max_length=20, dim=dim)
    model.save(tmp_path / "saved")
    assert export.main(["--model", str(tmp_path / "saved"), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    expected = model.encode(TEXTS)
    for side in ("right", "left"):
        assert is_close(run_texts(tmp_path / "out", TEXTS, side), expected)
    alone = np.concatenate([run_texts(tmp_path / "out", [text]) for text in TEXTS])
    assert is_close(alone, expected)


def test_the_page_and_the_card_show_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.write_text_model(tmp_path / "base", "bert")
    monkeypatch.chdir(tmp_path)
    assert export.main(["--model", str(base), "--format", "onnx", "--out", "exported"]) == 0
    expected = Embedder.from_pretrained(base, dtype="float32").encode(["a cat", "a dog"])
    page = Path(__file__).parents[2] / "docs" / "integrations.md"
    for text in (page.read_text().partition("### ONNX")[2], Path("exported/README.md").read_text()):
        names: dict[str, Any] = {}
        exec(text.partition("```python\n")[2].partition("```")[0], names)
        assert is_close(names["vectors"], expected)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    base = tiny.write_text_model(tmp_path / "base", "bert")
    adapter = tiny.write_adapter(base, tmp_path / "run")
    assert export.main(["--model", str(adapter), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    assert is_close(
        run_texts(tmp_path / "out", TEXTS), Embedder.from_pretrained(adapter, dtype="float32").encode(TEXTS)
    )


def test_heads_take_the_frozen_vectors(tmp_path: Path) -> None:
    import torch

    items = [Item(text) for text in dict.fromkeys(TEXTS)]
    vectors = np.random.default_rng(0).standard_normal((len(items), 24), dtype=np.float32)
    write_vectors(tmp_path, items, vectors)
    write_heads(tmp_path, tmp_path, hidden=32, blocks=2)
    network = HeadsNetwork.load(tmp_path)
    for parameter in network.parameters():  # untrained blocks change nothing
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    network.save_pretrained(str(tmp_path))
    assert export.main(["--model", str(tmp_path), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    expected = Embedder.from_pretrained(tmp_path, dtype="float32").encode(items)
    session = session_of(tmp_path / "out")
    assert is_close(session.run(None, {"vectors": vectors})[0], expected)
    alone = [session.run(None, {"vectors": vectors[i : i + 1]})[0] for i in range(len(items))]
    assert is_close(np.concatenate(alone), expected)


def test_what_has_no_onnx_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_model(tmp_path / "model")
    arguments = ["--model", str(model), "--format", "onnx", "--out", str(tmp_path / "out")]
    assert export.main(arguments) == 2
    assert "ONNX is written of text encoders and heads alone, leave --format out" in capsys.readouterr().err
    assert export.main([*arguments, "--dtype", "bfloat16"]) == 2
    assert "--dtype bfloat16 is not for --format onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
