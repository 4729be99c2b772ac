"""One writer a folder, whoever is killed; what a killed writer has left is told from what a living one writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

from b3 import locks
from b3.errors import RunError
from b3.files import atomic, tidy
from b3.locks import LOCK, alone

HOLDS = """
import sys, time
from pathlib import Path
from b3.files import atomic
from b3.locks import alone
folder = Path(sys.argv[1])
with alone(folder, "run", "go"), atomic(folder / "weights") as stream:
    stream.write(b"half")
    stream.flush()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_has_one_writer_and_is_free_after_its_end(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    folder = tmp_path / "run"
    message = rf"run is being written by another run \(process {holder.pid} on .+\); wait until it ends, or choose x"
    with pytest.raises(RunError, match=message), alone(folder, "run", "choose x"):
        pass
    tidy(folder)
    assert len(list(folder.glob(".weights.*.tmp"))) == 1, "its writer lives"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with alone(folder, "run", "choose x"):
        tidy(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert not any(folder.iterdir())


def test_a_lock_that_its_last_holder_took_away_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking: what is locked then has no name any more, and would keep nobody out."""
    take, files = locks.take, [tmp_path / LOCK]

    def late(descriptor: int) -> bool | None:
        if files:
            files.pop().unlink()
        return take(descriptor)

    monkeypatch.setattr(locks, "take", late)
    with alone(tmp_path, "run", "go"):
        assert not files and (tmp_path / LOCK).exists()


def test_a_file_that_only_looks_unfinished_is_kept(tmp_path: Path) -> None:
    for name in ("notes.tmp", ".notes.tmp", ".weights.0123456g.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".weights.01234567.tmp").touch()
    tidy(tmp_path)
    assert not (tmp_path / ".weights.01234567.tmp").exists() and len(list(tmp_path.iterdir())) == 3


def test_where_there_are_no_locks_nothing_is_refused_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    (tmp_path / ".weights.01234567.tmp").touch()
    with alone(tmp_path, "run", "go"), alone(tmp_path, "run", "go"), atomic(tmp_path / "weights") as stream:
        stream.write(b"whole")
        tidy(tmp_path)
        assert (tmp_path / ".weights.01234567.tmp").exists()
    assert (tmp_path / "weights").read_bytes() == b"whole"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file; choose x"), alone(tmp_path / "file", "run", "choose x"):
        pass
    with (
        pytest.raises(RunError, match=r"run cannot be written .*; choose x"),
        alone(tmp_path / "file" / "run", "run", "choose x"),
    ):
        pass
    assert os.listdir(tmp_path) == ["file"]
