"""Programs that tests start end with their test, and two test runs on one machine do not meet."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import processes
import pytest

LAUNCHER = """
import subprocess, sys
child = [sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"]
subprocess.Popen([*child, sys.argv[1]])
subprocess.Popen([*child, sys.argv[2]], start_new_session=True).wait()
"""


def runs(pid: str) -> bool:
    """False as well for a process that has ended and whose parent has not asked yet."""
    command = Path(f"/proc/{pid}/cmdline")
    return command.exists() and bool(command.read_bytes())


def test_a_program_out_of_time_takes_with_it_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its children too, and those that left its process group."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    files = [tmp_path / "one", tmp_path / "two"]

    def communicate(self: subprocess.Popen[str], timeout: float | None = None) -> tuple[str, str]:
        while timeout is not None and not all(file.exists() and file.read_text() for file in files):
            assert self.poll() is None
            time.sleep(0.02)
        return original(self, timeout=None if timeout is None else 0.1)

    original = subprocess.Popen.communicate
    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)  # the time is up once both children run
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run_python(tmp_path / "launcher.py", *files)
    assert not [file.name for file in files if runs(file.read_text())]


def test_no_test_has_a_port_of_its_own() -> None:
    port = re.compile(r"""master_port\W{0,6}\d{4}""", re.IGNORECASE)
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert port.search("--master_port={29560 + ranks}") and port.search('"MASTER_PORT": "29500"')
    found = [file.name for file in files if file != Path(__file__) and port.search(file.read_text())]
    assert not found, f"take a free port (processes.free_port) or torchrun --standalone in {found}"
