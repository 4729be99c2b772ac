"""MMEB-V2 by the command line: files, selections, reports, resuming, ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from forks import Job
from golden_data import checkpoint
from v2_runs import command, read, read_scores

import eval_mmeb
from b3.eval.benchmark import of_source
from b3.eval.benchmarks.mmeb_v2.benchmark import MMEB_V2, load_task
from b3.eval.ranking_metrics import METRICS

FEW = ["WebQA", "MSVD", "MomentSeeker", "ViDoSeek-doc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def contents(folder: Path) -> dict[str, bytes]:
    """Score, prediction and info files, and those of the summary that hold no times."""
    files = [*folder.glob("*/*_score.json"), *folder.glob("*/*.jsonl"), *folder.glob("*/*.npy")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def out(golden_v2: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "all"
    more = ["--ndcg", "reference", "--explain", "2"]
    assert eval_mmeb.main(command(golden_v2, folder, out, *more, subsets=["all"])) == 0
    return out


def test_all_writes_the_files_of_the_reference(golden_v2: Path, out: Path) -> None:
    recorded = golden_v2 / "results" / "base_fp32"
    tied = read(recorded / "scores_duplicates_tied.json")
    counted = [name for name in tied if MMEB_V2.task(name).is_counted]
    assert len(counted) == 33
    for name in counted:
        place = out / MMEB_V2.task(name).modality
        score, theirs = read(place / f"{name}_score.json"), read(recorded / f"{name}_score.json")
        assert list(score) == list(theirs) == [*METRICS, "num_pred", "num_data"]
        if not tied[name]["changed_by_ties"] and name != "VisRAG_SlideVQA":
            assert score == pytest.approx(theirs, abs=1e-9)
        assert (place / f"{name}_info.jsonl").read_bytes() == (recorded / f"{name}_info.jsonl").read_bytes()
        ours = [json.loads(line) for line in (place / f"{name}_pred.jsonl").read_text().splitlines()]
        for mine, line in zip(ours, (recorded / f"{name}_pred.jsonl").read_text().splitlines(), strict=True):
            reference = json.loads(line)
            assert list(mine) == list(reference)
            assert (mine["label"], mine["rel_scores"]) == (reference["label"], reference["rel_scores"])
            assert sorted(map(str, mine["prediction"])) == sorted(map(str, reference["prediction"]))


def test_reports(out: Path) -> None:
    summary = read(out / "summary.json")
    assert set(summary["modalities"]) == {"image", "video", "visdoc"}
    video = [summary["subsets"][task.name] for task in MMEB_V2.tasks if task.modality == "video"]
    assert summary["modalities"]["video"] == pytest.approx(np.mean(video))
    assert summary["mean"] == pytest.approx(np.mean(list(summary["subsets"].values())))
    assert summary["settings"]["harness"] == "vlm2vec"
    for group in ("families", "modalities", "subsets"):
        for name, (low, high) in summary["interval"][group].items():
            assert low <= summary[group][name] <= high
    text = (out / "summary.md").read_text()
    for part in (
        "harness vlm2vec",
        "| **video** | 18 of 18 tasks |",
        "WeMM-Embedding-2B",
        "| VLM2Vec-V2.0-Qwen2VL-2B |",
    ):
        assert part in text
    assert "answers of MVBench that are no candidate, never right: 1" in text
    assert (out / "families.png").stat().st_size > 10_000
    board = read(out / "leaderboard.json")
    assert set(board["metrics"]) == {"image", "video", "visdoc"}
    assert [len(board["metrics"][m]) for m in ("image", "video", "visdoc")] == [36, 18, 24]
    assert board["metrics"]["visdoc"]["ViDoSeek-page-fixed"] == "FILE_N/A"
    assert board["metrics"]["video"]["K700"]["num_data"] == 4
    shown = ("video/MSR-VTT", "visdoc/ViDoSeek-doc", "video/QVHighlight", "image/OVEN")
    pages = {name.split("/")[1]: (out / f"{name}_errors.html").read_text() for name in shown}
    assert pages["QVHighlight"].count("<img") > 10  # frames of query, right and predicted clip
    assert all("<img" in page and "unreadable" not in page for page in pages.values())


def test_the_same_command_scores_nothing_again(golden_v2: Path, folder: Path, out: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*_score.json")}
    (out / "video" / "MSVD_score.json").unlink()
    kept = contents(out)
    more = ["--ndcg", "reference", "--explain", "2"]
    assert eval_mmeb.main(command(golden_v2, folder, out, *more, subsets=["all"])) == 0
    after = {file: file.stat().st_mtime_ns for file in out.glob("*/*_score.json")}
    assert {file for file in after if after[file] != before[file]} == {out / "video" / "MSVD_score.json"}
    assert {name: content for name, content in contents(out).items() if name in kept} == kept
    assert read(out / "summary.json")["items"] == 0  # its vectors were still there


def test_an_item_of_several_tasks_is_encoded_once(golden_v2: Path, folder: Path, tmp_path: Path) -> None:
    tasks = ["ViDoRe_esg_reports_v2", "ViDoRe_esg_reports_v2_multilingual"]
    counts = {}
    for name, subsets in {"one": tasks[1:], "two": tasks}.items():
        assert eval_mmeb.main(command(golden_v2, folder, tmp_path / name, subsets=subsets)) == 0
        counts[name] = read(tmp_path / name / "summary.json")["items"]
    assert counts["one"] == counts["two"] == 8 + 14


@pytest.mark.parametrize(("ranks", "more"), [(2, []), (1, ["--dataloader_num_workers", "2"])])
def test_ranks_and_workers_change_no_byte(
    golden_v2: Path, folder: Path, tmp_path: Path, ranks: int, more: list[str]
) -> None:
    assert eval_mmeb.main(command(golden_v2, folder, tmp_path / "1", subsets=FEW)) == 0
    job = Job(
        tmp_path, *command(golden_v2, folder, tmp_path / "2", *more, subsets=FEW), ranks=ranks, program="eval_mmeb"
    )
    assert job.wait(300) == [0] * ranks, job.text()
    assert contents(tmp_path / "1") == contents(tmp_path / "2") != {}


def test_groups_modalities_and_new_names_select_tasks() -> None:
    assert len(MMEB_V2.expand(["all"], [])) == 78
    assert [len(MMEB_V2.expand([name], [])) for name in ("image", "video", "visdoc")] == [36, 18, 24]
    assert MMEB_V2.expand(["V-RET"], []) == ["DiDeMo", "MSR-VTT", "MSVD", "VATEX", "YouCook2"]
    assert MMEB_V2.expand(["ViDoSeek-page-fixed", "ood"], []) == [
        "ViDoSeek-page", "ViDoSeek-doc", "MMLongBench-page", "MMLongBench-doc",
    ]  # fmt: skip
    english = "ViDoRe_esg_reports_v2"
    assert english not in MMEB_V2.expand(["visdoc"], []) and MMEB_V2.expand([english], []) == [english]
    groups = {task.family for task in MMEB_V2.tasks if task.modality == "image"}
    assert groups == {"I-CLS", "I-QA", "I-RET", "I-VG"}


def test_the_published_scores_give_the_published_means() -> None:
    scores = MMEB_V2.published()["VLM2Vec-V2.0-Qwen2VL-2B"]
    means = MMEB_V2.family_means(scores)
    assert [round(100 * means[name], 1) for name in ("image", "video", "visdoc", "overall")] == [64.9, 34.7, 68.6, 59.1]
    assert len(scores) == 78 and of_source(None).name == "mmeb"


def test_grades_are_paired_right_unless_the_reference_is_asked_for(
    golden_v2: Path, folder: Path, tmp_path: Path
) -> None:
    task = "ViDoSeek-doc"
    for pairing, value in (("right", 0.53805), ("reference", 0.51500)):
        scores = read_scores(golden_v2, folder, tmp_path / pairing, [task], "--ndcg", pairing)
        assert round(scores[task]["ndcg_linear@5"], 5) == value
    assert eval_mmeb.main(command(golden_v2, folder, tmp_path / "right", "--ndcg", "reference", subsets=["MSVD"])) == 2


def test_captions_of_one_image_collapse_as_in_the_reference_or_not(golden_v2: Path) -> None:
    data = {"image_dir": str(golden_v2 / "data")}
    by_path = load_task(str(golden_v2 / "hub"), "WebQA", **data)
    by_pair = load_task(str(golden_v2 / "hub"), "WebQA", captions="pair", **data)
    assert (len(by_path.candidates), len(by_pair.candidates)) == (14, 32)
    assert all(len(query.labels) == 1 and query.labels[0] in by_pair.candidates for query in by_pair.queries)


def test_target_prefixes_stand_before_texts_and_not_in_names(golden_v2: Path) -> None:
    data = {"image_dir": str(golden_v2 / "data"), "prefix_targets": True}
    dataset = load_task(str(golden_v2 / "hub"), "ImageNet-1K", **data)
    assert dataset.candidates["piano"].text == "Represent the class label: piano"
    pictures = load_task(str(golden_v2 / "hub"), "NIGHTS", **data)
    assert not any("Represent the class" in (item.text or "") for item in pictures.candidates.values())


def test_a_resolution_spares_questions_about_videos(
    golden_v2: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--image_resolution", "low"]
    tasks = ["MSR-VTT", "NExTQA"]
    plain = read_scores(golden_v2, folder, tmp_path / "plain", tasks)
    ignored = read_scores(golden_v2, folder, tmp_path / "ignored", tasks, *more)
    assert "note: --image_resolution has no effect without --resize_use_processor False" in capsys.readouterr().out
    low = read_scores(golden_v2, folder, tmp_path / "low", tasks, *more, "--resize_use_processor", "false")
    assert plain == ignored
    assert low["NExTQA"] == plain["NExTQA"] and low["MSR-VTT"] != plain["MSR-VTT"]
    theirs = read(golden_v2 / "results" / "base_fp32_low128" / "MSR-VTT_score.json")
    assert low["MSR-VTT"] == pytest.approx(theirs, abs=1e-9)


def test_the_other_layout_of_the_archives(golden_v2: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    frames = golden_v2 / "data" / "video-tasks" / "frames"
    moved = data / "video-tasks" / "frames"
    shutil.copytree(frames / "video_ret" / "MSVD", moved / "video_ret" / "data/ziyan/video_retrieval/MSVD/frames")
    shutil.copytree(frames / "video_mret" / "Charades_STA", moved / "video_mret" / "Charades-STA")
    shutil.copytree(frames / "video_qa" / "EgoSchema", moved / "video_qa" / "egoschema")
    shutil.copytree(golden_v2 / "data" / "image-tasks", data / "image-tasks" / "MMEB")
    for task in ("MSVD", "Charades-STA", "EgoSchema", "WebQA"):
        usual = load_task(str(golden_v2 / "hub"), task, image_dir=str(golden_v2 / "data"))
        other = load_task(str(golden_v2 / "hub"), task, image_dir=str(data))
        assert len(usual) == len(other) and len(usual.candidates) == len(other.candidates)
        assert [len(query.item.media) for query in usual.queries] == [len(query.item.media) for query in other.queries]


def test_pages_come_from_files_or_from_the_table(golden_v2: Path, tmp_path: Path) -> None:
    """The table gives the bytes that the reference writes, a JPEG at PIL's default quality where a name says so."""
    for task in ("VisRAG_ChartQA", "VisRAG_SlideVQA"):
        of_files = load_task(str(golden_v2 / "hub"), task, image_dir=str(golden_v2 / "data"))
        of_table = load_task(str(golden_v2 / "hub"), task)
        for name, item in of_files.candidates.items():
            pixels = [np.asarray(one.images[0].open().convert("RGB")) for one in (item, of_table.candidates[name])]
            assert np.array_equal(*pixels), name
