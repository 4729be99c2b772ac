"""The embedded miniature of MMEB-V2: three modalities without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import checkpoint

import eval_mmeb
from b3.data.items import Item, Still, Video
from b3.data.tables import embedded_root
from b3.eval.benchmarks.emoji_v2 import EMOJI_V2, load_task
from b3.eval.ranked import RankedSet

HARNESSES = [("vlm2vec", "plain"), ("vlm2vec", "gme"), ("qwen3_vl_embedding", "qwen3_vl_embedding")]
SOURCE = EMOJI_V2.source


def items(dataset: RankedSet) -> list[Item]:
    return [*(query.item for query in dataset.queries), *dataset.candidates.values()]


@pytest.mark.parametrize(("harness", "prompt"), HARNESSES)
def test_every_task_can_be_written_for_every_model(harness: str, prompt: str) -> None:
    for task in EMOJI_V2.tasks:
        dataset = load_task(SOURCE, task.name, harness=harness, prompt=prompt)
        assert len(dataset) >= 20
        for query in dataset.queries:
            assert query.labels and set(query.labels) <= set(dataset.candidates)
            assert not dataset.is_local or set(query.labels) <= set(query.info["cand_names"])
            assert query.grades is None or len(query.grades) == len(query.labels)
        kinds = {type(medium) for item in items(dataset) for medium in item.media}
        expected: dict[str, set[Any]] = {"image": {Still}, "video": {Video}, "visdoc": {Still}}
        assert kinds == ({Still} if prompt == "gme" else expected[task.modality])
        texts = " ".join(item.text or "" for item in items(dataset))
        assert ("<|image_1|>" in texts or "<|video_1|>" in texts) == (prompt == "plain")
        assert (harness != "vlm2vec") == all(query.item.instruction for query in dataset.queries)


def test_it_is_small_and_described() -> None:
    root = embedded_root("emoji_v2")
    assert sum(file.stat().st_size for file in root.rglob("*")) < 3_000_000
    described = json.loads((root / "dataset.json").read_text())
    import hashlib

    for name, digest in described["sha256"].items():
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
    assert {task.name for task in EMOJI_V2.tasks if task.modality != "image"} == set(described["tasks"])


def centre(frame: Still, ground: np.ndarray) -> np.ndarray:
    """(2,) x and y of what differs from the ground."""
    pixels = np.asarray(frame.open().convert("RGB"), dtype=int)
    rows, columns = np.nonzero(np.abs(pixels - ground).sum(axis=2) > 40)
    return np.array([columns.mean(), rows.mean()])


def test_films_move_the_way_their_labels_say() -> None:
    """The sprite's centre, found in the pixels, moves as the label says; growing films fill more of the frame."""
    found = dict.fromkeys(("right", "left", "up", "down"), 0)
    for query in load_task(SOURCE, "film_cls").queries:
        (motion,), frames = query.labels, query.item.videos[0].frames
        way = str(motion).removeprefix("moves ").removeprefix("to the ")
        if way in found:
            found[way] += 1
            ground = np.asarray(frames[0].open().convert("RGB"), dtype=int)[40, [1, -2]]
            base = np.median(np.asarray(frames[3].open().convert("RGB"), dtype=int).reshape(-1, 3), axis=0)
            assert ground.shape == (2, 3)
            step = centre(frames[-1], base) - centre(frames[0], base)
            axis, sign = {"right": (0, 1), "left": (0, -1), "up": (1, -1), "down": (1, 1)}[way]
            assert sign * step[axis] > 25 and abs(step[1 - axis]) < 5, (query.labels, step)
    assert min(found.values()) >= 5


def test_an_evaluation_of_all_prints_three_modalities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    model = checkpoint(tmp_path / "model")
    command = f"--benchmark emoji_v2 --model_name {model} --normalize True --subset_name all --explain 2"
    assert eval_mmeb.main([*command.split(), "--encode_output_path", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for modality, number in {"image": 6, "video": 4, "visdoc": 3, "mean": 13}.items():
        assert f"| **{modality}** | {number} of {number} tasks |" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["subsets"]) == {task.name for task in EMOJI_V2.tasks}
    assert not (tmp_path / "out" / "leaderboard.json").exists()
    assert (tmp_path / "out" / "families.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "video" / "film_moment_errors.html").read_text().count("<img") > 20
    assert (tmp_path / "out" / "visdoc" / "chart_errors.html").read_text().count("<img") >= 6


def test_an_unknown_task_lists_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    command = f"--benchmark emoji_v2 --model_name {checkpoint(tmp_path / 'model')} --subset_name film_nothing"
    assert eval_mmeb.main([*command.split(), "--encode_output_path", str(tmp_path / "out")]) == 2
    assert "emoji_v2 has no task 'film_nothing'; choose emoji_cls, " in capsys.readouterr().err
