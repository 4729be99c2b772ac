"""Metrics of ranked lists equal the recorded ones of the reference's metric file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from b3.eval.ranking_metrics import METRICS, query_metrics


def groups(golden: Path) -> list[dict]:
    return json.loads((golden / "metrics.json").read_text())


def of_case(case: dict, pairing: str) -> dict[str, float]:
    labels = case["label"] if isinstance(case["label"], list) else [case["label"]]
    return query_metrics(case["prediction"], labels, case["rel_scores"], pairing)


def test_every_case_equals_the_reference(golden_v2: Path) -> None:
    checked = 0
    for group in groups(golden_v2):
        for pairing, expected, per_case in (
            ("reference", "expected", "per_case"),
            ("right", "right_pairing", "right_pairing_per_case"),
        ):
            if expected not in group or "raises" in group[expected]:
                continue
            ours = [of_case(case, pairing) for case in group["cases"]]
            for mine, theirs in zip(ours, group[per_case], strict=True):
                for name, value in theirs.items():
                    assert mine[name] == pytest.approx(value, abs=1e-12), (group["name"], name)
                    checked += 1
            for name, value in group[expected].items():
                assert np.mean([mine[name] for mine in ours]) == pytest.approx(value, abs=1e-12)
    assert checked > 2000


def test_the_reference_pairing_scrambles_unequal_grades_of_integers(golden_v2: Path) -> None:
    scrambled = next(group for group in groups(golden_v2) if group["name"] == "graded_integers_scrambled")
    assert any(of_case(case, "right") != of_case(case, "reference") for case in scrambled["cases"])


def test_names_that_are_not_integers_keep_the_right_pairing(golden_v2: Path) -> None:
    strings = next(group for group in groups(golden_v2) if group["name"] == "graded_strings")
    for case, theirs in zip(strings["cases"], strings["right_pairing_per_case"], strict=True):
        values = of_case(case, "reference")
        assert {name: values[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)


def test_a_repeated_label_counts_once_with_its_highest_grade() -> None:
    once = query_metrics(["a", "b"], ["b"], [3])
    assert query_metrics(["a", "b"], ["b", "b"], [1, 3]) == once


def test_without_candidates_all_is_zero_but_there_are_all_metrics() -> None:
    values = query_metrics([], ["a"])
    assert set(values) == set(METRICS) and not any(values.values())
