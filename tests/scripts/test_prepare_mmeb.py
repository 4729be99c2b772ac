"""MMEB from a local copy of the hub: extraction is safe, can be continued, and is checked."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from b3.data.datasets import load_eval
from b3.data.tables import list_subsets
from scripts import prepare_mmeb as mmeb
from scripts.prepare_mmeb import main


def write_rows(root: Path, subset: str, paths: list[str]) -> None:
    (root / subset).mkdir(parents=True, exist_ok=True)
    table = {
        "qry_text": ["<|image_1|>\nWhat is it?\n"] * len(paths),
        "qry_img_path": paths,
        "tgt_text": [["a", "b"]] * len(paths),
        "tgt_img_path": [["", ""]] * len(paths),
    }
    pq.write_table(pa.table(table), root / subset / "test-00000-of-00001.parquet")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Two subsets whose images share one archive, as MMEB-eval."""
    root = tmp_path / "hub"
    root.mkdir()
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._x", "junk")
        for subset in ("CIRR", "N24News"):
            paths = [f"{subset}/{i}.png" for i in range(4)]
            write_rows(root, subset, paths)
            for i, path in enumerate(paths):
                archive.writestr(path, tiny.image("red", "disc", i))
    return root


def prepare(hub: Path, out: Path, *more: str) -> int:
    return main(["eval", "--source", str(hub), "--out", str(out), *more])


def files(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}


def test_the_folder_serves_as_data_set_and_image_folder(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(hub, out) == 0
    printed = capsys.readouterr().out
    assert "to copy" in printed
    assert "free" in printed
    assert "images.zip: 8 files extracted" in printed
    assert list_subsets(str(out), "test") == ["CIRR", "N24News"]
    data = load_eval(str(out), "CIRR", image_dir=str(out))
    image = data.query(3).open_image()
    assert image is not None
    assert image.size[0] >= 56
    assert not [name for name in files(out) if name.endswith(".tmp") or "MACOSX" in name]
    marker = json.loads((out / ".extracted" / "images.zip.json").read_text())
    assert marker["members"] == 8
    assert prepare(hub, out) == 0
    assert "0 archives to extract, 1 extracted before" in capsys.readouterr().out


def test_continue_writes_only_what_is_missing_or_of_another_size(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(hub, out) == 0
    (out / ".extracted" / "images.zip.json").unlink()
    (out / "CIRR" / "0.png").unlink()
    (out / "CIRR" / "1.png").write_bytes(b"half")
    capsys.readouterr()
    assert prepare(hub, out) == 0
    assert "2 files extracted" in capsys.readouterr().out


def test_subsets_take_only_their_images_and_can_be_widened(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(hub, out, "--subsets", "CIRR") == 0
    assert not [name for name in files(out) if "N24News" in name]
    assert prepare(hub, out) == 0
    assert sum("N24News" in name for name in files(out)) == 5


def test_archives_a_subset_with_another_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MMEB-train: rows say images/<subset>/..., archives start at <subset>/."""
    root, out = tmp_path / "hub", tmp_path / "out"
    (root / "images_zip").mkdir(parents=True)
    for subset in ("CIRR", "NIGHTS"):
        write_rows(root, subset, [f"images/{subset}/Train/0.png"])
        with zipfile.ZipFile(root / "images_zip" / f"{subset}.zip", "w") as archive:
            archive.writestr(f"{subset}/Train/0.png", tiny.image("blue", "bar", 0))
    assert main(["train", "--source", str(root), "--out", str(out), "--subsets", "CIRR"]) == 0
    assert (out / "images/CIRR/Train/0.png").is_file()
    assert not (out / "images/NIGHTS").exists()
    assert "1 archives to extract" in capsys.readouterr().out


def link_member() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("CIRR/link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("../evil.png", "leaves the folder"),
        ("CIRR/../../evil.png", "leaves the folder"),
        ("/evil.png", "is an absolute path"),
        ("C:/evil.png", "is an absolute path"),
        ("..\\evil.png", "is an absolute path"),
        (link_member(), "is a symbolic link"),
        ("CIRR/test-00000-of-00001.parquet", "would replace a data file"),
    ],
)
def test_members_that_leave_the_folder_are_refused(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], member: str | zipfile.ZipInfo, reason: str
) -> None:
    out = tmp_path / "deep" / "out"
    with zipfile.ZipFile(hub / "images.zip", "a") as archive:
        archive.writestr(member, "/etc/hostname")
    assert prepare(hub, out) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "images.zip" in error
    assert not out.exists()
    assert not list(tmp_path.rglob("evil*"))


def test_a_truncated_archive_is_named(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (hub / "images.zip").read_bytes()
    (hub / "images.zip").write_bytes(whole[: len(whole) // 2])
    assert prepare(hub, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "images.zip is not a complete zip archive" in error
    assert "delete it and run the same command again" in error


def test_a_damaged_member_leaves_no_file(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, out = hub / "images.zip", tmp_path / "out"
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("CIRR/2.png").header_offset
    data = bytearray(archive.read_bytes())
    data[start + 30 + len("CIRR/2.png") + 40] ^= 0xFF
    archive.write_bytes(bytes(data))
    assert prepare(hub, out) == 2
    assert "images.zip is not a complete zip archive" in capsys.readouterr().err
    assert not (out / "CIRR/2.png").exists()
    assert not (out / ".extracted").exists()
    assert not [name for name in files(out) if name.endswith(".tmp")]


def test_too_little_disk_is_refused_before_anything_is_written(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    assert prepare(hub, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1000 bytes free" in error
    assert "--subsets" in error
    assert not (tmp_path / "out").exists()


def test_missing_images_are_counted(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(hub, "CIRR", ["CIRR/0.png", "CIRR/nowhere.png"])
    assert prepare(hub, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert "1 MISSING, first CIRR/nowhere.png" in printed.out
    assert "1 of the image paths looked up" in printed.err


def test_unknown_subset_and_wrong_folder(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(hub, tmp_path / "out", "--subsets", "CIRRR") == 2
    assert "there is: CIRR, N24News" in capsys.readouterr().err
    assert prepare(tmp_path / "nothing", tmp_path / "out") == 2
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", tmp_path / "out") == 2
    assert "not laid out like MMEB" in capsys.readouterr().err


def test_the_hub_is_listed_downloaded_and_then_measured_again(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client is replaced by a copy of local files; the archive's size is estimated until it is there."""
    out, asked = tmp_path / "out", []

    def fetch(repository: str, wanted: list[mmeb.RemoteFile], to: Path, revision: str | None) -> None:
        asked.append([file.path for file in wanted])
        shutil.copytree(hub, to, dirs_exist_ok=True)

    monkeypatch.setattr(mmeb, "list_hub", lambda repository, revision: mmeb.list_source(hub))
    monkeypatch.setattr(mmeb, "download", fetch)
    assert main(["eval", "--out", str(out)]) == 0
    assert "to download, about" in capsys.readouterr().out
    (out / "images.zip").unlink()
    assert main(["eval", "--out", str(out)]) == 0
    assert len(asked) == 1
    assert "images.zip" in asked[0]


def test_offline_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--out", str(tmp_path / "out")]) == 2
    assert "TIGER-Lab/MMEB-eval cannot be listed" in capsys.readouterr().err
