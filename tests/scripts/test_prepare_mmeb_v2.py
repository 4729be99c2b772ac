"""MMEB-V2 from a local copy of the hub: chosen tasks alone, both layouts, parts, safe, and it can be continued."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from b3.data import tarballs
from b3.errors import InputError
from b3.eval.benchmarks.mmeb_v2.benchmark import load_task
from scripts import prepare_mmeb_v2 as v2
from scripts.prepare_mmeb import main

CHOSEN = ["WebQA", "MSVD", "Charades-STA", "EgoSchema", "Breakfast", "ViDoSeek-doc"]


def pack(target: Path, folder: Path, prefix: str) -> None:
    """A folder as a tar.gz whose members begin with `prefix`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.add(file, f"{prefix}{file.relative_to(folder).as_posix()}")


@pytest.fixture(scope="module")
def hub(golden_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and archives as on the hub, each archive packed from another depth; one in three parts."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(golden_v2 / "hub", root, dirs_exist_ok=True)
    archives, frames = root / v2.REPOSITORY, golden_v2 / "data" / "video-tasks" / "frames"
    pack(archives / "image-tasks" / "mmeb_v1.tar.gz", golden_v2 / "data" / "image-tasks", "MMEB/")
    pack(archives / "video-tasks/frames/video_cls.tar.gz", frames / "video_cls", "video_cls/")
    moments = shutil.copytree(frames / "video_mret", root / "moments")
    (moments / "Charades_STA").rename(moments / "Charades-STA")
    pack(archives / "video-tasks/frames/video_mret.tar.gz", moments, "./")
    shutil.rmtree(moments)
    pack(archives / "video-tasks/frames/video_ret.tar.gz", frames / "video_ret" / "MSVD",
         "video_ret/data/ziyan/video_retrieval/MSVD/frames/")  # fmt: skip
    whole = root / "qa.tar.gz"
    pack(whole, frames / "video_qa", "frames/video_qa/")
    content = whole.read_bytes()
    third = len(content) // 3
    for number in range(3):
        part = archives / "video-tasks" / "frames" / f"video_qa.tar.gz-{number:02d}"
        part.write_bytes(content[number * third : (number + 1) * third if number < 2 else None])
    whole.unlink()
    return root


def prepare(hub: Path, out: Path, *more: str) -> int:
    return main(["eval-v2", "--source", str(hub), "--out", str(out), *more])


def files(out: Path) -> set[str]:
    return {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}


def test_the_folder_serves_the_evaluation(
    golden_v2: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(hub, out, "--tasks", *CHOSEN) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "8 tables of 6 repositories" in printed[0] and "5 archives to extract" in printed[0]
    assert "to copy, up to" in printed[1] and "free" in printed[1]
    assert printed[-1] == f"ready: --benchmark mmeb_v2 --dataset_name {out / 'hub'} --data_basedir {out / 'data'}"
    assert any(line.split() == "MSVD 6 queries, 6 candidates; 670 are published".split() for line in printed)
    for task in CHOSEN:
        ours = load_task(str(out / "hub"), task, image_dir=str(out / "data"))
        theirs = load_task(str(golden_v2 / "hub"), task, image_dir=str(golden_v2 / "data"))
        pairs = zip([q.item for q in ours.queries], [q.item for q in theirs.queries], strict=True)
        pairs = [*pairs, *zip(ours.candidates.values(), theirs.candidates.values(), strict=True)]
        for mine, reference in pairs:
            assert mine.text == reference.text and len(mine.media) == len(reference.media)
            assert [one.open().tobytes() for one in mine.images] == [one.open().tobytes() for one in reference.images]
            for a, b in zip(mine.videos, reference.videos, strict=True):
                assert [frame.open().tobytes() for frame in a.frames] == [frame.open().tobytes() for frame in b.frames]


def test_only_what_the_tasks_need_is_taken_and_more_can_follow(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(hub, out, "--tasks", "WebQA", "EgoSchema") == 0
    taken = files(out)
    assert {name.split("/")[2] for name in taken if name.startswith("hub/")} == {"MMEB_Test_Instruct", "EgoSchema"}
    videos = {name.split("/")[4] for name in taken if name.startswith("data/video-tasks")}
    assert videos == {"EgoSchema"}
    images = {name.removeprefix("data/image-tasks/MMEB/") for name in taken if name.startswith("data/image-tasks")}
    assert images and all(name.startswith("shared/") for name in images)
    assert prepare(hub, out, "--tasks", "EgoSchema", "NExTQA") == 0
    videos = {name.split("/")[4] for name in files(out) if name.startswith("data/video-tasks")}
    assert videos == {"EgoSchema", "NExTQA"}


def test_it_continues_where_it_was(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(hub, out, "--tasks", "MSVD") == 0
    assert "0 archives to extract, 1 extracted before" not in capsys.readouterr().out
    before = files(out)
    assert prepare(hub, out, "--tasks", "MSVD") == 0
    assert "0 archives to extract, 1 extracted before" in capsys.readouterr().out
    (out / ".extracted" / "video-tasks__frames__video_ret.tar.gz.json").unlink()
    frames = sorted((out / "data").rglob("*.jpg"))
    frames[0].unlink()
    frames[1].write_bytes(b"half")
    assert prepare(hub, out, "--tasks", "MSVD") == 0
    assert "video_ret.tar.gz: 2 files extracted" in capsys.readouterr().out
    assert files(out) == before and not [name for name in before if name.endswith(".tmp")]


def test_a_missing_part_or_a_cut_archive_is_said(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(hub, tmp_path / "hub")
    archive = copy / v2.REPOSITORY / "video-tasks" / "frames" / "video_ret.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert prepare(copy, tmp_path / "cut", "--tasks", "MSVD") == 2
    assert "is not a complete tar archive" in capsys.readouterr().err
    (copy / v2.REPOSITORY / "video-tasks" / "frames" / "video_qa.tar.gz-02").unlink()
    assert prepare(copy, tmp_path / "part", "--tasks", "NExTQA") == 2
    assert "is not a complete tar archive" in capsys.readouterr().err
    assert not list((tmp_path / "part").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "Nothing"], "MMEB-V2 has no task 'Nothing'"),
        (["--tasks", "VATEX", "SUN397"], "--source has no ziyjiang/MMEB_Test_Instruct/SUN397/test*.parquet"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert prepare(hub, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_frames_that_an_archive_lacks_are_named(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(hub, tmp_path / "out", "--tasks", "MSVD", "VATEX") == 2
    captured = capsys.readouterr()
    assert "1 of 2 tasks are not complete, the first: " in captured.err and "VATEX" in captured.err
    assert "6 queries" in captured.out


def test_tasks_are_of_eval_v2_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--out", str(tmp_path), "--tasks", "MSVD"]) == 2
    assert "--tasks is for eval-v2" in capsys.readouterr().err


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../../evil.jpg"), "leaves the folder"),
        (member("/etc/evil.jpg"), "is an absolute path"),
        (member("a\\b.jpg"), "not a POSIX path"),
        (member("x/link", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (member("x/hard", tarfile.LNKTYPE, "../../evil"), "is a link"),
        (member("x/pipe", tarfile.FIFOTYPE), "is a special file"),
    ],
)
def test_members_that_could_leave_the_folder_are_refused(tmp_path: Path, bad: tarfile.TarInfo, message: str) -> None:
    file = tmp_path / "bad.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(member("x/good.jpg"), io.BytesIO(b"good"))
        archive.addfile(bad, io.BytesIO(b"evil"))
    out = tmp_path / "deep" / "down" / "out"
    with pytest.raises(InputError, match=message):
        tarballs.extract([file], out, lambda name: name)
    assert files(tmp_path) <= {"bad.tar.gz", "deep/down/out/x/good.jpg"}


def test_junk_of_other_systems_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        for name in ("x/._a.jpg", "__MACOSX/a.jpg", "x/.DS_Store", "x/a.jpg"):
            archive.addfile(member(name), io.BytesIO(b"good"))
    assert tarballs.extract([file], tmp_path / "out", lambda name: name) == 1
    assert files(tmp_path / "out") == {"x/a.jpg"}


def test_tables_of_the_hub_in_any_layout(golden_v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the `datasets` library: JSON lines, and pages whose bytes stay inside."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "someone" / "videos"
    own.mkdir(parents=True)
    (own / "test.jsonl").write_text("".join(json.dumps({"video_id": i, "pos_text": "a"}) + "\n" for i in range(3)))
    pages = tmp_path / "someone" / "pages" / "corpus"
    shutil.copytree(golden_v2 / "hub" / "VLM2Vec" / "ViDoSeek" / "corpus", pages)
    header = (
        "---\nconfigs:\n- config_name: corpus\n  data_files:\n  - split: test\n    path: corpus/test.parquet\n---\n"
    )
    (pages.parent / "README.md").write_text(header)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tables = [("someone/videos", "", "test"), ("someone/pages", "corpus", "test")]
    v2.fetch_tables(tables, tmp_path / "hub")
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "hub/someone/videos/test.parquet")["video_id"].to_pylist() == [0, 1, 2]
    kept = pq.read_table(tmp_path / "hub/someone/pages/corpus/test.parquet").to_pylist()
    stored = pq.read_table(pages / "test.parquet").to_pylist()
    assert [row["image"]["bytes"] for row in kept] == [row["image"]["bytes"] for row in stored]
