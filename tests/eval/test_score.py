"""Scoring and tables against a brute-force version."""

from __future__ import annotations

import numpy as np
import pytest

from b3.eval.benchmarks.emoji import EMOJI
from b3.eval.benchmarks.mmeb import MMEB
from b3.eval.report import markdown_table, summarise
from b3.eval.score import row_scores


def test_copies_of_a_candidate_tie_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        vectors = rng.normal(size=(7, 33)).astype(np.float32)
        query = rng.normal(size=33).astype(np.float32)
        index = rng.integers(0, 7, size=40)
        scores = row_scores(query, vectors, index)
        assert all(len(set(scores[index == k])) <= 1 for k in range(7))
        assert np.allclose(scores, vectors[index] @ query, atol=1e-4)


def test_the_36_subsets() -> None:
    families = [task.family for task in MMEB.tasks]
    assert len(MMEB.tasks) == 36 == len(set(MMEB.names))
    assert [families.count(f) for f in ("Classification", "VQA", "Retrieval", "Visual grounding")] == [10, 10, 12, 4]
    assert sum(bool(task.in_domain) for task in MMEB.tasks) == 20


def test_means_are_plain_means_over_subsets() -> None:
    precision = {task.name: i / 100 for i, task in enumerate(MMEB.tasks)}
    summary = summarise(precision, MMEB)
    assert summary["mean"] == pytest.approx(np.mean(list(precision.values())))
    assert summary["families"]["VQA"] == pytest.approx(
        np.mean([precision[task.name] for task in MMEB.tasks if task.family == "VQA"])
    )
    assert (summary["IND"] * 20 + summary["OOD"] * 16) / 36 == pytest.approx(summary["mean"])


def test_table_has_a_column_a_model() -> None:
    summary = summarise({"OK-VQA": 0.5, "mine": 0.25}, MMEB)
    lines = markdown_table({"a": summary, "b": summary}, MMEB).splitlines()
    assert lines[0] == "| subset | family | a | b |"
    assert "| mine | Other | 25.0 | 25.0 |" in lines
    assert lines[-1] == "| **mean** |  | **37.5** | **37.5** |"


def test_all_expands_to_what_is_there() -> None:
    assert MMEB.expand(["all"], ["x", "y"]) == ["x", "y"]
    assert len(MMEB.expand(["all"], [])) == 36
    assert MMEB.expand(["a", "a", "b"], []) == ["a", "b"]
    assert len(MMEB.expand(["vqa", "Visual grounding"], [])) == 14
    assert EMOJI.expand(["classification", "x"], ["x", "emoji_cls", "emoji_vqa"]) == ["emoji_cls", "x"]
