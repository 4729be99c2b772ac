"""A benchmark is one file and one line: this one lies outside the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_data import checkpoint

import eval_mmeb
from b3 import registry

TOY = """
import pyarrow as pa
from b3.data.datasets import EvalDataset
from b3.eval.benchmark import Benchmark, Task

ROWS = {
    "echo": {"qry_text": ["red", "blue"], "tgt_text": [["red", "green"], ["blue", "red", "red"]]},
    "wrong": {"qry_text": ["red"], "tgt_text": [["green", "red"]]},
}


def load(source, task, split, image_dir=None, prefix_targets=False):
    rows = ROWS[task]
    empty = {"qry_img_path": [""] * len(rows["qry_text"]), "tgt_img_path": [[""] * len(t) for t in rows["tgt_text"]]}
    return EvalDataset(task, pa.table({**rows, **empty}))


BENCHMARK = Benchmark(
    "toy", (Task("echo", "Toys"), Task("wrong", "Toys")), "toy:", load=load, subsets=lambda source, split: []
)
"""


def test_a_benchmark_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy_benchmark.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BENCHMARKS, "toy", "toy_benchmark:BENCHMARK")
    (tmp_path / "model").mkdir()
    model = checkpoint(tmp_path / "model")
    command = f"--benchmark toy --model_name {model} --subset_name all --encode_output_path {tmp_path / 'out'}"
    assert eval_mmeb.main([*command.split(), "--normalize", "True"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["subsets"] == {"echo": 1.0, "wrong": 0.0}
    assert summary["families"] == {"Toys": 0.5}
    assert "| echo | Toys | 100.0 |" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("leaderboard*"))
    other = f"--benchmark emoji --model_name {model} --subset_name emoji_vqa --dataset_name toy:"
    assert eval_mmeb.main([*other.split(), "--encode_output_path", str(tmp_path / "out"), "--normalize", "True"]) == 2


def test_an_unknown_benchmark_lists_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    model = checkpoint(tmp_path / "model")
    command = f"--benchmark toy --model_name {model} --subset_name all --encode_output_path {tmp_path / 'out'}"
    assert eval_mmeb.main(command.split()) == 2
    assert "there is no benchmark 'toy'; choose from emoji, emoji_v2, mmeb, mmeb_v2" in capsys.readouterr().err
