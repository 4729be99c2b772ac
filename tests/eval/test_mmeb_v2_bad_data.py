"""MMEB-V2 with something wrong: each case has a decided behaviour, most one line, exit code 2, and a remedy."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden_data import checkpoint
from PIL import Image
from v2_runs import command, read, read_scores

import eval_mmeb
from b3.errors import DataError
from b3.eval.benchmarks.mmeb_v2.benchmark import load_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def data(golden_v2: Path, tmp_path: Path) -> Path:
    """A copy to spoil, of four tasks."""
    for name in ("hub/VLM2Vec", "hub/ziyjiang", "data/video-tasks/frames/video_ret", "data/image-tasks"):
        shutil.copytree(golden_v2 / name, tmp_path / "copy" / name)
    shutil.copytree(
        golden_v2 / "data/video-tasks/frames/video_mret", tmp_path / "copy/data/video-tasks/frames/video_mret"
    )
    return tmp_path / "copy"


def change(data: Path, table: str, edit: Callable[[list[dict]], Any]) -> None:
    file = data / "hub" / "VLM2Vec" / table
    stored = pq.read_table(file)
    rows = stored.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)


def without(key: str, value: Any) -> Callable[[list[dict]], None]:
    def edit(rows: list[dict]) -> None:
        rows[:] = [row for row in rows if row[key] != value]

    return edit


def put(row: int, **values: Any) -> Callable[[list[dict]], None]:
    def edit(rows: list[dict]) -> None:
        for number, record in enumerate(rows):
            record.update(values if number == row else {key: type(v)(record[key]) for key, v in values.items()})

    return edit


PAGES = "ViDoSeek"
BAD = {
    "grade that is no number": (
        "ViDoSeek-doc", lambda d: change(d, f"{PAGES}/qrels/test.parquet", put(2, score="two")),
        "VLM2Vec/ViDoSeek/qrels row 0: score",
    ),
    "grade that is not finite": (
        "ViDoSeek-doc", lambda d: change(d, f"{PAGES}/qrels/test.parquet", put(2, score=float("nan"))),
        "VLM2Vec/ViDoSeek/qrels row 2: score nan is not a number",
    ),
    "query without a page": (
        "ViDoSeek-doc", lambda d: change(d, f"{PAGES}/qrels/test.parquet", without("query-id", 3)),
        "ViDoSeek-doc query 3 has no page with a grade above 0",
    ),
    "page that is not in the corpus": (
        "ViDoSeek-doc", lambda d: change(d, f"{PAGES}/corpus/test.parquet", without("corpus-id", 30)),
        "page 30 is not in the corpus",
    ),
    "missing column": (
        "MSVD", lambda d: change(d, "MSVD/test.parquet", lambda rows: [row.pop("caption") for row in rows]),
        "VLM2Vec/MSVD split test: column(s) caption missing; found video_id, video",
    ),
    "missing table": ("MSVD", lambda d: shutil.rmtree(d / "hub/VLM2Vec/MSVD"), "no test*.parquet in"),
    "missing frame folder": (
        "MSVD", lambda d: shutil.rmtree(d / "data/video-tasks/frames/video_ret/MSVD/u2"),
        "MSVD row 2: frame folder",
    ),
    "frame folder without frames": (
        "MSVD", lambda d: [f.unlink() for f in (d / "data/video-tasks/frames/video_ret/MSVD/u2").iterdir()],
        "holds no frames (.jpg, .jpeg, .png); restore it, or give --on_error skip",
    ),
    "missing archive": ("MSVD", lambda d: shutil.rmtree(d / "data/video-tasks"), "unpack the archive there"),
    "moment without a positive": (
        "QVHighlight",
        lambda d: shutil.rmtree(d / "data/video-tasks/frames/video_mret/QVHighlight/m1/positive_0"),
        "QVHighlight row 1: no folder of",
    ),
    "no right clip": (
        "MomentSeeker", lambda d: change(d, "MomentSeeker/test.parquet", lambda r: r[1].update(positive_frames=[])),
        "MomentSeeker row 1: no positive_frames",
    ),
    "answer that is no option": (
        "NExTQA", lambda d: change(d, "NExTQA/MC/test.parquet", put(1, answer=7)),
        "NExTQA row 1: answer 7 is none of 5 options",
    ),
    "classes without the right one": (
        "SmthSmthV2", lambda d: change(d, "SmthSmthV2/test.parquet", lambda rows: rows[0].update(pos_text="nothing")),
        "SmthSmthV2 row 0: neg_text lacks pos_text 'nothing'",
    ),
    "missing image": (
        "OVEN", lambda d: (d / "data/image-tasks/shared/w2.jpg").unlink(),
        "image 'shared/w2.jpg' is not in",
    ),
    "truncated image": (
        "OVEN", lambda d: (d / "data/image-tasks/shared/w2.jpg").write_bytes(b"\xff\xd8"), "does not decode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line(
    golden_v2: Path, data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    task, spoil, message = BAD[case]
    for name in ("video_qa", "video_cls"):
        place = data / "data/video-tasks/frames" / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(golden_v2 / "data/video-tasks/frames" / name)
    spoil(data)
    assert eval_mmeb.main(command(data, folder, tmp_path / "out", subsets=[task])) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "subsets", "message"),
    [
        ([], ["Nothing"], "MMEB-V2 has no task 'Nothing'; choose names, groups, image, video, visdoc or all"),
        (["--data_basedir", "/nowhere"], ["MSVD"], "--data_basedir /nowhere does not exist"),
        (["--dataset_name", "/nowhere"], ["MSVD"], "--dataset_name /nowhere is no folder"),
        (["--harness", "qwen3_vl_embedding", "--prompt", "plain"], ["MSVD"], "use --harness vlm2vec, or give --prompt"),
    ],
)
def test_mistakes_are_one_line(
    golden_v2: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], subsets: list[str], message: str,
) -> None:  # fmt: skip
    assert eval_mmeb.main(command(golden_v2, folder, tmp_path / "out", *more, subsets=subsets)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_published_flag_of_gme(golden_v2: Path, folder: Path, tmp_path: Path) -> None:
    scores = read_scores(golden_v2, folder, tmp_path / "gme", ["WebQA", "NIGHTS"], "--model_backbone", "gme")
    for task, score in scores.items():
        assert score == pytest.approx(read(golden_v2 / "gme" / f"{task}_score.json"), abs=1e-9)
    assert read(tmp_path / "gme" / "summary.json")["settings"]["prompt"] == "gme"


def test_flags_of_v2_are_refused_elsewhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"--model_name {folder} --benchmark emoji --subset_name all --encode_output_path {tmp_path} --harness vlm2vec"
    )
    assert eval_mmeb.main(words.split()) == 2
    assert "--harness is for --benchmark mmeb_v2 or emoji_v2, not emoji" in capsys.readouterr().err


def test_scores_of_another_program_are_never_taken(golden_v2: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "MSVD_score.json").write_text("{}")
    assert eval_mmeb.main(command(golden_v2, folder, tmp_path, subsets=["MSVD"])) == 2


def test_a_missing_folder_is_skipped_and_counted(data: Path, folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "data/video-tasks/frames/video_ret/MSVD/u2")
    more = ["--on_error", "skip"]
    assert eval_mmeb.main(command(data, folder, tmp_path / "out", *more, subsets=["MSVD"])) == 0
    score = read(tmp_path / "out" / "video" / "MSVD_score.json")
    assert (score["num_data"], score["num_pred"], score["num_incomplete"]) == (6, 6, 6)
    assert any("u2" in reason for reason in score["skipped"])
    rows = [json.loads(line) for line in (tmp_path / "out/video/MSVD_pred.jsonl").read_text().splitlines()]
    assert all(len(row["prediction"]) == 5 and "u2" not in row["prediction"] for row in rows)
    assert np.load(tmp_path / "out" / "video" / "MSVD_values.npy")[2] == 0


def test_a_query_that_cannot_be_read_is_wrong(data: Path, folder: Path, tmp_path: Path) -> None:
    (data / "data/image-tasks/NIGHTS/n0.jpg").write_bytes(b"")
    assert eval_mmeb.main(command(data, folder, tmp_path / "out", "--on_error", "skip", subsets=["NIGHTS"])) == 0
    first = json.loads((tmp_path / "out/image/NIGHTS_pred.jsonl").read_text().splitlines()[0])
    assert first["prediction"] == [] and np.load(tmp_path / "out/image/NIGHTS_values.npy")[0] == 0
    assert read(tmp_path / "out/image/NIGHTS_score.json")["num_incomplete"] == 1


@pytest.mark.parametrize("kept", [0, 60, 400])
def test_a_truncated_frame_is_left_out_with_a_note(
    data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    """Cut in its header or behind it: the others are the video."""
    frames = sorted((data / "data/video-tasks/frames/video_ret/MSVD/u1").glob("*.jpg"))
    broken = frames[3]
    broken.write_bytes(broken.read_bytes()[:kept])
    one = load_task(str(data / "hub"), "MSVD", image_dir=str(data / "data")).candidates["u1"]
    assert str(broken) in [str(frame.source) for frame in one.videos[0].frames]
    assert eval_mmeb.main(command(data, folder, tmp_path / "out", subsets=["MSVD"])) == 0
    assert "1 of 8 frames of" in capsys.readouterr().err or kept < 400
    from b3 import Embedder
    from b3.data.items import Item, Video

    model = Embedder.from_pretrained(folder, dtype="float32")
    rest = tuple(frame for frame in one.videos[0].frames if str(frame.source) != str(broken))
    vectors = model.encode([one, Item(one.text, media=(Video(rest),))])
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6


def test_a_page_above_the_pixel_limit(
    golden_v2: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    monkeypatch.setattr("warnings.filters", [*__import__("warnings").filters])
    task = ["MMLongBench-doc"]
    assert eval_mmeb.main(command(golden_v2, folder, tmp_path / "fail", subsets=task)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: MMLongBench-doc candidate 10") and "is too large" in error
    assert eval_mmeb.main(command(golden_v2, folder, tmp_path / "skip", "--on_error", "skip", subsets=task)) == 0
    score = read(tmp_path / "skip" / "visdoc" / "MMLongBench-doc_score.json")
    assert score["num_incomplete"] == score["num_data"] and any("too large" in why for why in score["skipped"].values())


def test_of_two_pages_with_one_name_the_first_counts(data: Path, tmp_path: Path) -> None:
    def png(colour: str) -> dict[str, Any]:
        stream = io.BytesIO()
        Image.new("RGB", (60, 80), colour).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    def edit(rows: list[dict]) -> None:
        rows[0]["image"] = png("red")
        rows.append({**rows[0], "image": png("blue")})

    change(data, "ViDoSeek/corpus/test.parquet", edit)
    dataset = load_task(str(data / "hub"), "ViDoSeek-doc")
    assert dataset.notes == ["pages of ViDoSeek-doc whose name occurred before; the first counts: 1"]
    first = pq.read_table(data / "hub/VLM2Vec/ViDoSeek/corpus/test.parquet")["corpus-id"][0].as_py()
    assert dataset.candidates[first].images[0].open().getpixel((5, 5)) == (255, 0, 0)


def test_an_unknown_task_is_named(golden_v2: Path) -> None:
    with pytest.raises(DataError, match="split test: no"):
        load_task(str(golden_v2 / "hub"), "Country211", image_dir=str(golden_v2 / "data"))


def test_tables_of_the_hub(golden_v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the `datasets` library, with and without configurations; pages stay in its files."""
    configs = {"VLM2Vec/MSVD": [], "VLM2Vec/MSR-VTT": ["test_1k"], "VLM2Vec/ViDoSeek": ["queries", "corpus", "qrels"]}
    for repository, names in configs.items():
        place = shutil.copytree(golden_v2 / "hub" / repository, tmp_path / repository)
        entries = [
            {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test.parquet"}]} for name in names
        ]
        if names:
            (place / "README.md").write_text(f"---\n{json.dumps({'configs': entries})}\n---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for task in ("MSVD", "MSR-VTT", "ViDoSeek-doc"):
        ours = load_task("hub", task, image_dir=str(golden_v2 / "data"))
        theirs = load_task(str(golden_v2 / "hub"), task, image_dir=str(golden_v2 / "data"))
        assert [query.info for query in ours.queries] == [query.info for query in theirs.queries]
        assert list(ours.candidates) == list(theirs.candidates)
    pages = zip(ours.candidates.values(), theirs.candidates.values(), strict=True)
    assert all(a.images[0].peek() == b.images[0].peek() for a, b in pages)


def test_nulls_where_a_value_is_not_needed(data: Path) -> None:
    file = data / "hub/ziyjiang/MMEB_Test_Instruct/ImageNet-1K/test.parquet"
    rows = pq.read_table(file).to_pylist()
    before = load_task(str(data / "hub"), "ImageNet-1K", image_dir=str(data / "data"))
    for row in rows:
        row.update({name: row[name] or None for name in ("qry_text", "tgt_inst")})
        row["tgt_img_path"] = [path or None for path in row["tgt_img_path"]]
    pq.write_table(pa.Table.from_pylist(rows), file)
    after = load_task(str(data / "hub"), "ImageNet-1K", image_dir=str(data / "data"))
    assert [query.item.key for query in after.queries] == [query.item.key for query in before.queries]
    assert after.candidates == before.candidates
