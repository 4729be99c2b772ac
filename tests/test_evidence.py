"""The evidence grid in miniature: data, plans, runs, results and page; its statistics against brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence import page, tables
from benchmarks.evidence.grid import expand
from benchmarks.evidence.measure import ranks_of_answers
from benchmarks.evidence.results import Cell, Results, collect, difference
from benchmarks.evidence.run import execute_missing
from benchmarks.evidence.students import make_students
from benchmarks.evidence.wordnet import hashed_ngrams, split, write_data

GRID: dict[str, Any] = {
    "seeds": 2,
    "defaults": {
        "recipe": "benchmarks/evidence/base_wordnet.yaml",
        "small": True,
        "size": 8,
        "examples": 64,
        "lr_at_64": 3e-3,
        "lr_power": 0.5,
    },
    "axes": {
        "small": {True: ["mining.p=2", "mining.m=8", "mining.k=4"]},
        "arm": {"random": ["batch.policy=random"], "b3": []},
    },
    "questions": {"both": {"parts": [{"arm": ["random", "b3"]}]}, "again": {"parts": [{"arm": "b3"}]}},
}


def synsets(count: int = 800) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]

    def text(length: int) -> str:
        return " ".join(random.choice(words, size=length).tolist())

    return [
        {
            "id": f"{i}-{'noun' if i % 2 else 'verb'}",
            "lemmas": [f"lemma{i} {text(1)}", f"other{i}"],
            "definition": f"{text(6)} {i}",
            "examples": [f"{text(4)} {i}"] if i % 3 == 0 else [],
        }
        for i in range(count)
    ]


def test_split_keeps_held_out_lemmas_out_of_training() -> None:
    some = synsets()
    for i in range(0, 800, 10):
        some[i]["lemmas"].append("shared")
    parts = split(some, scale=0.01)
    held = {lemma for rows in parts["queries"].values() for row in rows for lemma in row["lemmas"]}
    trained = [row for rows in parts["train"].values() for row in rows]
    assert not held & {lemma for row in trained for lemma in row["lemmas"]}
    pool = [row["target"] for row in parts["pool"]]
    assert len(set(pool)) == len(pool) == 200
    assert not set(pool) & {row["target"] for row in trained}
    assert {row["target"] for rows in parts["queries"].values() for row in rows} <= set(pool)


def test_ranks_leave_out_other_right_answers() -> None:
    random = np.random.default_rng(1)
    queries, pool = random.normal(size=(7, 5)), random.normal(size=(30, 5))
    answers = random.integers(30, size=7)
    right = [[int(a), 3, 4] if i % 2 else [int(a)] for i, a in enumerate(answers)]
    found = ranks_of_answers(queries, pool, answers, right)
    for i in range(7):
        own = queries[i] @ pool[answers[i]]
        others = [c for c in range(30) if c not in right[i] and c != answers[i]]
        assert found[i] == sum(queries[i] @ pool[c] >= own for c in others)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random, truth, covered = np.random.default_rng(2), 0.3, 0
    weights = np.repeat([1 / (2 * 60), 1 / (2 * 20)], [60, 20])
    records = [{"seed": s, "facts": {}} for s in range(4)]
    for _ in range(100):
        query = random.normal(size=80)
        control = Cell(records, query + random.normal(size=(4, 80)), weights)
        arm = Cell(records, control.values + truth + random.normal(size=(4, 80)), weights)
        mean, low, high = difference(arm, control, draws=400)
        assert mean == pytest.approx(arm.mean - control.mean)
        covered += low <= truth <= high
    assert 85 <= covered <= 100


def test_the_grid_from_data_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    write_data(
        root / "wordnet",
        split(synsets(), scale=0.008),
        lambda texts: {layer: hashed_ngrams(texts, 24 + layer) for layer in (0, 2, 6)},
    )
    make_students(root)
    questions = expand(GRID, str(root))
    runs = [run for listed in questions.values() for run in listed]
    assert len(runs) == 6 and len({run.key for run in runs}) == 4
    said: list[str] = []
    assert execute_missing(runs, 2, said.append) == []
    assert execute_missing(runs, 2, said.append) == [] and said[-1].startswith("4 runs, 0 missing")
    assert collect(root, questions, tmp_path / "results.json", "here") == 0
    results = Results(tmp_path / "results.json")
    recorded = (tmp_path / "results.json").read_bytes()
    (root / "results").rename(root / "elsewhere")
    assert collect(root, questions, tmp_path / "results.json", "here") == 0  # what is recorded stays
    assert (tmp_path / "results.json").read_bytes() == recorded
    assert collect(root, questions, tmp_path / "new.json", "here") == len(runs)
    cell = results.cell("both", arm="b3")
    assert cell is not None and len(cell.records) == 2 and 0 < cell.mean < 1
    assert cell.fact("in_community") > 0
    again = results.cell("again")
    assert again is not None and again.mean == cell.mean
    (tmp_path / "page.md").write_text(
        "# Here\n\n{{pivot both rows=arm columns=size control=random}}\n\n"
        "{{listing both axes=arm controls=random facts=window,above}}\n\n{{plot both x=size by=arm file=p}}\n"
    )
    monkeypatch.setattr(page, "HERE", tmp_path)
    page.write_page(results, tmp_path)
    text = (tmp_path / "evidence.md").read_text()
    assert f"{100 * cell.mean:.1f} ± {100 * cell.sd:.1f}" in text and "b3 − random" in text
    assert (tmp_path / "images" / "p.png").stat().st_size > 5000
    assert "{{" not in text
    assert tables.pivot(results, "both", "arm", "size").count("\n") == 3
