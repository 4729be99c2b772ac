"""A verdict on a reproduction, tried on published scores of the same model twice and of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from b3.errors import InputError
from b3.eval.benchmarks.mmeb import MMEB, load_baselines
from b3.eval.benchmarks.mmeb_marks import B3_2B, MARKS, Marks
from b3.eval.compare import KINDS, compare, main

OLD, NEW = load_baselines("v2.0.0"), load_baselines("v2.0.1")


def write(folder: Path, scores: dict[str, float], model: str = "x") -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"subsets": scores}))
    (folder / "manifest.json").write_text(json.dumps({"benchmark": "mmeb", "names": {"model": model}}))
    return folder


@pytest.mark.parametrize("model", [name for name in NEW if name.startswith("VLM2Vec")])
def test_two_published_versions_of_a_model_agree(model: str) -> None:
    result = compare(OLD[model], Marks(NEW[model], ""), MMEB, KINDS["checkpoint"])
    assert not result.why_not and len(result.subsets) == 36 and result.verdict == "reproduced: 36 subsets compared"
    assert max(abs(line.difference) for line in result.subsets) > 0.5, "they are not the same numbers"


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_do_not(kind: str) -> None:
    result = compare(NEW["VLM2Vec-V1-Qwen2VL-2B"], Marks(NEW["VLM2Vec-V1-Qwen2VL-7B"], ""), MMEB, KINDS[kind])
    assert "subsets are more than" in result.verdict and "mean is 59." in result.verdict


def test_better_scores_fail_a_checkpoint_and_not_a_training() -> None:
    theirs = NEW["VLM2Vec-V1-Qwen2VL-2B"]
    better = {name: score + 0.05 for name, score in theirs.items()}
    assert compare(better, Marks(theirs, ""), MMEB, KINDS["checkpoint"]).why_not
    assert not compare(better, Marks(theirs, ""), MMEB, KINDS["training"]).why_not


@pytest.mark.parametrize(("gap", "is_same"), [(-0.012, False), (-0.009, True), (0.009, True), (0.012, False)])
def test_the_tolerance_of_subsets_is_a_point(gap: float, is_same: bool) -> None:
    theirs = {name: NEW["VLM2Vec-V1-Qwen2VL-2B"][name] for name in ("CIRR", "NIGHTS", "WebQA")}
    ours = {name: score + gap for name, score in theirs.items()}
    result = compare(ours, Marks(theirs, ""), MMEB, KINDS["checkpoint"])
    assert (not result.why_not) == is_same and not result.means


def test_a_doubtful_score_is_shown_and_not_counted() -> None:
    ours = B3_2B | {"MSCOCO_i2t": 0.72}
    result = compare(ours, MARKS["B3_Qwen2_2B"], MMEB, KINDS["checkpoint"])
    line = next(line for line in result.subsets if line.name == "MSCOCO_i2t")
    assert line.verdict == "above" and not line.is_counted and not result.why_not
    assert {line.name for line in result.means} == {"Classification", "VQA", "IND"}, "groups that were scored whole"


def test_the_marks_are_consistent() -> None:
    """Third-party subsets add up to the paper's groups, and groups to the means, as far as they are rounded."""
    marks = MARKS["B3_Qwen2_2B"]
    for family in ("Classification", "VQA"):
        names = [task.name for task in MMEB.tasks if task.family == family]
        assert sum(marks.subsets[n] for n in names) / 10 == pytest.approx(marks.means[family], abs=0.001)
    for known in MARKS.values():
        counts = {"Retrieval": 12, "Classification": 10, "VQA": 10, "Visual grounding": 4}
        total = sum(known.means[family] * n for family, n in counts.items()) / 36
        assert total == pytest.approx(known.means["mean"], abs=0.0006)
        assert (20 * known.means["IND"] + 16 * known.means["OOD"]) / 36 == pytest.approx(
            known.means["mean"], abs=0.0006
        )
        assert set(known.subsets) <= set(MMEB.names)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "VLM2Vec-V1-Qwen2VL-2B"
    ours = write(tmp_path / "eval", OLD[model], f"TIGER-Lab/{model}")
    assert main([str(tmp_path)]) == 0, "the run's folder, and the model's own name"
    out = capsys.readouterr().out
    assert out.endswith("reproduced: 36 subsets compared\n") and "ImageNet-1K" in out
    assert main([str(ours), "--model", "B3_Qwen2_2B"]) == 3
    assert "not reproduced: " in capsys.readouterr().out
    assert main([str(ours), "--subset", "0.1", "--json"]) == 3
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert tree["tolerance"]["subset"] == 0.1 and len(tree["subsets"]) == 36
    assert main([str(ours), "--against", str(write(tmp_path / "other", NEW[model]))]) == 0


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = write(tmp_path / "eval", {"CIRR": 0.5})
    for arguments, message in (
        ([str(ours)], "give --model; known on mmeb: B3_Qwen2_2B"),
        ([str(ours), "--model", "nobody"], "no published scores of 'nobody'"),
        ([str(ours / "x"), "--model", "nobody"], "holds no summary.json"),
        ([str(ours), "--model", "B3_Qwen2_7B"], "nothing can be compared"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="nothing can be compared"):
        compare({"mine": 0.5}, Marks({}, ""), MMEB, KINDS["checkpoint"])
