"""Recorded runs repeated: which are chosen, and when a score counts as the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import repeat
from benchmarks.evidence.grid import HERE, ROOT, Run, expand, read_grid
from benchmarks.evidence.results import Results, collect

GRID: dict[str, Any] = {
    "seeds": 3,
    "defaults": {"recipe": "benchmarks/evidence/base_wordnet.yaml", "arm": "b3"},
    "axes": {
        "arm": {"random": ["batch.policy=random"], "b3": [], "b3_mixed": ["batch.policy=b3_mixed"]},
        "p": ["mining.p={}"],
    },
    "questions": {
        "first": {"parts": [{"arm": ["random", "b3", "b3_mixed"]}]},
        "second": {"parts": [{"arm": ["random", "b3"]}, {"p": [1, 2]}]},
        "emoji": {"parts": [{"recipe": "benchmarks/evidence/base_emoji.yaml", "arm": ["random", "b3"]}]},
    },
}


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Run]]:
    return expand(GRID, ROOT)


def test_repeated_runs_are_spread_over_kinds_arms_and_questions(questions: dict[str, list[Run]]) -> None:
    recorded = {run.key: None for listed in questions.values() for run in listed}
    chosen = repeat.choose(questions, recorded, 4, by_question=False)
    assert len(chosen) == 8 == len({one.key for one in chosen})
    assert [one.run.key for one in chosen] == [one.key for one in chosen]
    assert all(one.run in questions[one.question] for one in chosen)
    text, image = ([o for o in chosen if ("emoji" in o.run.recipe) == is_emoji] for is_emoji in (False, True))
    for listed in (text, image):
        assert sum(one.traits[0] is True for one in listed) == 2, "as many of mined batches as of random ones"
    assert {dict(one.run.labels)["arm"] for one in text} == {"random", "b3", "b3_mixed"}
    assert {one.question for one in text} == {"first", "second"}
    again = repeat.choose(dict(reversed(questions.items())), recorded, 4, by_question=False)
    assert {one.key for one in again} == {one.key for one in chosen}


def test_only_recorded_runs_are_repeated_and_none_twice(questions: dict[str, list[Run]]) -> None:
    both = {run.key for run in questions["first"]} & {run.key for run in questions["second"]}
    assert len(both) == 6  # random and b3, three seeds
    recorded = dict.fromkeys(sorted(both)[:3])
    chosen = repeat.choose(questions, recorded, 2, by_question=True)
    assert len(chosen) == 3 and {one.key for one in chosen} == set(recorded)
    assert [one.question for one in chosen].count("first") == 2
    assert repeat.choose(questions, {}, 2, by_question=True) == []


def write(root: Path, run: Run, ranks: dict[str, np.ndarray]) -> None:
    """What a finished run leaves."""
    key = replace(run, root=str(root)).key
    (root / "results").mkdir(parents=True, exist_ok=True)
    (root / "results" / f"{key}.json").write_text(f'{{"key": "{run.key}", "facts": {{}}, "seed": {run.seed}}}')
    np.savez(root / "results" / f"{key}.npz", **{name: value.astype(np.uint16) for name, value in ranks.items()})


def compared(
    tmp_path: Path, runs: list[Run], change: Callable[[np.ndarray], np.ndarray], least: int = 0
) -> tuple[list[str], bool]:
    """Rows of the table and the verdict where the recorded ranks are changed in that way."""
    random = np.random.default_rng(0)
    recorded, here = tmp_path / "recorded", tmp_path / "here"
    for run in runs:
        ranks = {name: least + random.integers(0, 5, size=200) for name in ("noun", "validation/noun")}
        write(recorded, replace(run, root=ROOT), ranks)
        name = replace(run, root=str(recorded)).key
        for suffix in (".json", ".npz"):  # recorded under the key of the usual place
            (recorded / "results" / f"{name}{suffix}").rename(recorded / "results" / f"{run.key}{suffix}")
        write(here, run, {"noun": change(ranks["noun"]), "validation/noun": ranks["validation/noun"]})
    assert collect(recorded, {"first": runs}, tmp_path / "results.json", "there") == 0
    chosen = [repeat.Chosen(run, run.key, "first") for run in runs]
    table, agree = repeat.compare(chosen, Results(tmp_path / "results.json"), here)
    return table.splitlines()[2:], agree


def test_equal_and_nearly_equal_scores_agree(tmp_path: Path, questions: dict[str, list[Run]]) -> None:
    lines, agree = compared(tmp_path / "equal", questions["first"][:2], lambda ranks: ranks)
    assert agree and len(lines) == 2 and all("| +0.00 | [+0.00, +0.00] | yes |" in line for line in lines)
    lines, agree = compared(tmp_path / "order", questions["first"][:1], np.random.default_rng(1).permutation)
    assert agree and lines[0].endswith("| yes |") and "[+0.00, +0.00]" not in lines[0]  # other queries, the same score


def test_a_difference_that_does_not_show_is_none(tmp_path: Path, questions: dict[str, list[Run]]) -> None:
    first = questions["first"][:1]
    lines, agree = compared(tmp_path, first, lambda ranks: ranks + 1, least=9_000)  # of every query, in one direction
    assert agree and lines[0].endswith("| +0.00 | [+0.00, +0.00] | yes |")


def test_a_score_that_differs_by_more_than_chance_is_told(tmp_path: Path, questions: dict[str, list[Run]]) -> None:
    lines, agree = compared(tmp_path, questions["first"][:1], lambda ranks: ranks + 1)
    assert not agree and lines[0].endswith("| no |")
    before, now, difference = (float(cell) for cell in lines[0].split(" | ")[1:4])
    assert difference == pytest.approx(now - before, abs=0.011) and difference < -5


def test_emoji_are_compared_by_precision(tmp_path: Path, questions: dict[str, list[Run]]) -> None:
    lines, agree = compared(tmp_path, questions["emoji"][:1], lambda ranks: ranks * 2)  # whatever is not first is wrong
    assert agree and "| +0.00 | [+0.00, +0.00] |" in lines[0]


def test_a_run_without_result_does_not_agree(tmp_path: Path, questions: dict[str, list[Run]]) -> None:
    run = questions["first"][0]
    compared(tmp_path, [run], lambda ranks: ranks)
    chosen = [repeat.Chosen(run, run.key, "first")]
    table, agree = repeat.compare(chosen, Results(tmp_path / "results.json"), tmp_path / "nothing")
    assert not agree and "failed" in table


def test_a_call_begins_anew_after_a_table_and_goes_on_before(tmp_path: Path) -> None:
    place = tmp_path / "again"
    for name, is_kept in (("half", True), (repeat.TABLE, False)):
        repeat.begin(place)
        (place / name).write_text("")
        repeat.begin(place)
        assert (place / "half").exists() == is_kept and place.exists()


def test_every_recipe_of_the_committed_results_can_be_repeated() -> None:
    everything: dict[str, list[Run]] = {}
    for name in command.GRIDS:
        everything |= expand(read_grid(HERE / f"{name}.yaml"), ROOT)
    some = {name: runs[:2] for name, runs in everything.items()}
    chosen = repeat.choose(some, Results(command.COMMITTED).runs, 1, by_question=False)
    assert {Path(one.run.recipe) for one in chosen} == {
        Path(run.recipe) for runs in everything.values() for run in runs
    }


def test_new_runs_are_those_without_a_committed_result(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Run] = []
    monkeypatch.setattr(command, "make", lambda runs, root, workers: given.extend(runs) or ["stop"])
    monkeypatch.setattr(command, "collect", lambda *rest: 0)
    monkeypatch.setattr("sys.argv", ["evidence", "--questions", "labels", "--new"])
    known = Results(command.COMMITTED)
    left_out = next(key for labels, seed, key in known.questions["labels"] if (labels["arm"], seed) == ("b3", 1))
    del known.runs[left_out]
    monkeypatch.setattr(command, "Results", lambda file: known)
    assert command.main() == 1
    assert [run.key for run in given] == [left_out]


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--questions", "sise"], "no question 'sise'"), (["--repeat", "0"], "at least 1")]
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evidence", *arguments])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2 and said in capsys.readouterr().err
