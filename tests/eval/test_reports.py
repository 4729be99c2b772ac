"""Published baselines, intervals, the leaderboard file, the page of wrong predictions and the plot by family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny import image

from b3.data.datasets import EvalDataset
from b3.data.images import FolderImages
from b3.errors import InputError
from b3.eval.benchmarks.emoji import EMOJI
from b3.eval.benchmarks.mmeb import MMEB, leaderboard_json, load_baselines
from b3.eval.page import margin, sample_errors, write_explanations
from b3.eval.plots import DEFAULT_BASELINES, plot_families
from b3.eval.report import bootstrap_interval, bootstrap_mean, summarise
from b3.eval.score import SubsetScore

# Cls, VQA, Ret, VG, IND, OOD, all: percent, computed apart from the same score files.
PUBLISHED = {
    "VLM2Vec-V1-Qwen2VL-2B": (58.61, 49.16, 65.03, 73.05, 64.80, 53.39, 59.73),
    "VLM2Vec-V1-Qwen2VL-7B": (62.76, 56.52, 69.40, 81.90, 71.30, 57.94, 65.37),
    "VLM2Vec-V2.0-Qwen2VL-2B": (62.93, 56.42, 69.60, 77.12, 68.82, 60.05, 64.92),
    "gme-Qwen2-VL-2B-Instruct": (54.55, 29.84, 66.75, 55.62, 49.20, 55.22, 51.87),
    "gme-Qwen2-VL-7B-Instruct": (57.56, 34.57, 71.20, 59.45, 53.60, 58.85, 55.93),
    "LamRA-Ret": (59.27, 26.49, 70.06, 62.62, 53.12, 55.40, 54.13),
    "LamRA-Ret-Qwen2.5VL-7b": (51.19, 33.31, 67.72, 58.45, 51.82, 53.44, 52.54),
    "colpali-v1.3": (40.45, 11.48, 48.15, 39.75, 35.07, 34.67, 34.89),
}


def all_36(value: float = 0.5) -> dict[str, float]:
    return {task.name: value + 0.01 * (i % 7) for i, task in enumerate(MMEB.tasks)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_family_means_of_the_published_scores(model: str) -> None:
    scores = load_baselines()[model]
    assert len(scores) == 36
    assert [100 * mean for mean in MMEB.family_means(scores).values()] == pytest.approx(PUBLISHED[model], abs=0.05)


def test_published_scores_are_shares_and_cannot_be_changed_from_outside() -> None:
    assert load_baselines().keys() == PUBLISHED.keys() == load_baselines("v2.0.0").keys()
    assert all(0 <= value <= 1 for scores in load_baselines().values() for value in scores.values())
    load_baselines()["LamRA-Ret"].clear()
    assert load_baselines()["LamRA-Ret"]
    with pytest.raises(InputError, match=r"v2\.0\.1"):
        load_baselines("v9")


def test_family_means_only_of_whole_families() -> None:
    scores = all_36()
    del scores["WebQA"]
    assert MMEB.family_means(scores).keys() == {"Classification", "VQA", "Visual grounding", "OOD"}
    assert MMEB.family_means({task.name: 1.0 for task in EMOJI.tasks}) == {}
    summary = summarise(all_36(), MMEB)
    assert MMEB.family_means(all_36()) == pytest.approx(
        summary["families"] | {"IND": summary["IND"], "OOD": summary["OOD"], "overall": summary["mean"]}
    )


def test_interval_equals_resampling_of_rows() -> None:
    rng = np.random.default_rng(3)
    correct = rng.random(400) < 0.7
    means = correct[rng.integers(0, 400, size=(20000, 400))].mean(axis=1)
    expected = np.quantile(means, [0.025, 0.975])
    low, high = bootstrap_interval(correct, draws=20000)
    assert (low, high) == pytest.approx(expected, abs=0.004)
    width = 2 * 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 400)
    assert high - low == pytest.approx(width, rel=0.05)
    assert low < correct.mean() < high
    assert bootstrap_interval(correct) == bootstrap_interval(rng.permutation(correct))
    narrow = bootstrap_interval(correct, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(np.ones(9, dtype=bool)) == (1.0, 1.0)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(500):
        low, high = bootstrap_interval(rng.random(300) < 0.6, draws=400, seed=seed)
        hits += low <= 0.6 <= high
    assert 0.92 <= hits / 500 <= 0.98


def test_interval_of_the_mean_draws_within_subsets() -> None:
    rng = np.random.default_rng(1)
    correct = {"a": rng.random(100) < 0.9, "b": rng.random(1000) < 0.3}
    low, high = bootstrap_mean(correct, draws=20000)
    variance = sum(v.mean() * (1 - v.mean()) / len(v) for v in correct.values()) / 4
    mean = np.mean([v.mean() for v in correct.values()])
    assert (low, high) == pytest.approx((mean - 1.96 * variance**0.5, mean + 1.96 * variance**0.5), abs=0.003)
    assert (low, high) == bootstrap_mean(dict(reversed(correct.items())), draws=20000)
    assert bootstrap_mean({"a": correct["a"]}) == pytest.approx(bootstrap_interval(correct["a"]))


def test_leaderboard_file_round_trip() -> None:
    precision = all_36() | {"emoji_cls": 1.0}
    rows = dict.fromkeys(precision, 1000)
    result = leaderboard_json(summarise(precision, MMEB), {"model_name": "mine", "model_size": 2.2}, rows)
    read = json.loads(json.dumps(result))
    assert read["metadata"]["model_name"] == "mine"
    assert read["metadata"]["model_size"] == 2.2
    assert read["metadata"]["report_generated_date"]
    assert read["metrics"].keys() == {"image", "video", "visdoc"}
    assert {name: facts["hit@1"] for name, facts in read["metrics"]["image"].items()} == all_36()
    assert all(facts["num_pred"] == facts["num_data"] == 1000 for facts in read["metrics"]["image"].values())


def test_leaderboard_file_needs_a_name_and_a_subset() -> None:
    summary = summarise({"OK-VQA": 0.5}, MMEB)
    assert leaderboard_json(summary, {"model_name": "x"})["metrics"]["image"] == {"OK-VQA": {"hit@1": 0.5}}
    with pytest.raises(InputError, match="model name"):
        leaderboard_json(summary, {})
    with pytest.raises(InputError, match="none of them"):
        leaderboard_json(summarise({"emoji_cls": 0.5}, MMEB), {"model_name": "x"})


@pytest.fixture
def dataset(tmp_path: Path) -> EvalDataset:
    """Six rows of four candidates: images as queries, of which that of row 1 is missing and that of row 2 broken."""
    for i, colour in enumerate(["red", "green", "blue", "black", "white", "orange"]):
        (tmp_path / f"{i}.png").write_bytes(image(colour, "disc", i))
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"not an image")
    table = pa.table(
        {
            "qry_text": [f"<|image_1|>\nquery number {i} <b>&\n" for i in range(6)],
            "qry_img_path": [f"{i}.png" for i in range(6)],
            "tgt_text": [[f"right<{i}>", f"wrong {i}", f"third {i}", ""] for i in range(6)],
            "tgt_img_path": [["", "", "", "0.png"]] * 6,
        }
    )
    return EvalDataset("mine", table, FolderImages(tmp_path), target_prefix="PREFIX ")


def scored(margins: list[float]) -> SubsetScore:
    """One row of four candidates a margin; the second is predicted where it is negative."""
    scores = [np.asarray([0.5, 0.5 - m, 0.1, 0.2], dtype=np.float32) for m in margins]
    predicted = np.asarray([int(s.argmax()) for s in scores])
    return SubsetScore("mine", predicted, scores, np.zeros(len(scores), dtype=bool))


def test_page_of_wrong_predictions(dataset: EvalDataset, tmp_path: Path) -> None:
    score = scored([-0.1, -0.3, -0.2, 0.1, 0.2, -0.05])
    path = write_explanations(tmp_path / "out", dataset, score, 10)
    page = path.read_text()
    assert path.name == "mine_errors.html"
    assert "<b>33.3 %</b>" in page
    assert "6 rows, 4 wrong · shown: all of them" in page
    assert page.count("<section ") == 4
    places = [page.index(f"query number {row} ") for row in (1, 2, 0, 5)]
    assert places == sorted(places)
    assert "query number 3 " not in page
    for text in ("right&lt;1&gt;", "wrong 1", "third 1", "query number 1 &lt;b&gt;&amp;", "margin <b>-0.300</b>"):
        assert text in page
    assert "<code>0.800</code>" in page
    assert "ranks 2 of 4" in page
    assert not any(text in page for text in ("right<1>", "<|image_1|>", "image_1", "PREFIX"))
    assert page.count("unreadable image") == 2
    assert page.count("data:image/png;base64,") == 2 + 4  # queries 0 and 5, and a candidate of each row
    assert "http" not in page


def test_page_shows_a_sample_that_depends_on_the_seed_alone(dataset: EvalDataset, tmp_path: Path) -> None:
    score = scored([-0.1, -0.3, -0.2, -0.4, -0.5, -0.05])
    pages = [write_explanations(tmp_path, dataset, score, 2, seed).read_bytes() for seed in (0, 0)]
    assert pages[0] == pages[1]
    assert pages[0].count(b"<section ") == 2
    assert "6 wrong · shown: a random sample of 2" in pages[0].decode()
    assert len({tuple(sample_errors(score, 2, seed)) for seed in range(20)}) > 3
    shown = [margin(score, row) for row in sample_errors(score, 4)]
    assert shown == sorted(shown)
    with pytest.raises(InputError, match="at least 1"):
        write_explanations(tmp_path, dataset, score, 0)


def test_page_with_rows_that_could_not_be_scored(dataset: EvalDataset, tmp_path: Path) -> None:
    score = scored([0.1, 0.1, -0.1, 0.1, -0.2, 0.1])
    score.scores[1][:], score.predicted[1], score.incomplete[1] = -np.inf, -1, True
    score.scores[4][0], score.incomplete[4] = -np.inf, True
    assert sample_errors(score, 9) == [2, 1, 4]
    page = write_explanations(tmp_path, dataset, score, 9).read_text()
    assert "2 rows with something unreadable" in page
    assert page.count("the right candidate could not be scored") == 2
    assert "Predicted none" in page
    assert not any(word in page for word in (">-inf<", ">nan<"))


def test_page_without_wrong_predictions(dataset: EvalDataset, tmp_path: Path) -> None:
    page = write_explanations(tmp_path, dataset, scored([0.1] * 6), 5).read_text()
    assert "No prediction is wrong." in page
    assert "<b>100.0 %</b>" in page
    assert "<section " not in page


def test_plot_by_family(tmp_path: Path) -> None:
    summary = summarise(all_36(), MMEB, {task.name: (5, 9) for task in MMEB.tasks})
    assert plot_families(summary, tmp_path / "new" / "families.png", MMEB)
    assert (tmp_path / "new" / "families.png").read_bytes().startswith(b"\x89PNG")
    one = {task.name: 0.5 for task in MMEB.tasks if task.family == "VQA"}
    assert plot_families(summarise(one, MMEB), tmp_path / "one.png", MMEB, baselines=["LamRA-Ret"])
    assert set(DEFAULT_BASELINES) <= load_baselines().keys()
    with pytest.raises(InputError, match="colpali"):
        plot_families(summary, tmp_path / "no.png", MMEB, baselines=["nobody"])


def test_no_plot_without_a_whole_family(tmp_path: Path) -> None:
    emoji = summarise({task.name: 0.5 for task in EMOJI.tasks}, EMOJI)
    assert plot_families(emoji, tmp_path / "emoji.png", MMEB) is False
    assert plot_families(summarise({"OK-VQA": 0.5}, MMEB), tmp_path / "emoji.png", MMEB) is False
    assert not list(tmp_path.iterdir())
