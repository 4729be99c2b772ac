"""A program that is asked to end says one line, deletes what is unfinished, and does not wait for a library."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from b3 import errors, signals
from b3.files import atomic
signals.PATIENCE = 0.3
def main():
    with atomic(Path(sys.argv[1]) / "file") as stream:
        stream.write(b"half")
        print("ready", flush=True)
        if sys.argv[2] == "in C":  # where no handler of Python runs, as in a message of gloo
            mutex, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)
        time.sleep(600)
sys.exit(errors.command(main)())
"""


@pytest.mark.parametrize("where", ["in Python", "in C"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGUSR1, 138, "ended by SIGUSR1"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_one_line_and_the_exit_code_of_the_signal(
    tmp_path: Path, number: signal.Signals, code: int, said: str, where: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), where],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, f"{said}; run the same command again to continue\n")
    assert where == "in C" or not any(tmp_path.iterdir())


def test_signals_are_as_before_afterwards() -> None:
    from b3.errors import command

    before = signal.getsignal(signal.SIGTERM)
    inside = []
    assert command(lambda: inside.append(signal.getsignal(signal.SIGTERM)))() == 0
    assert inside != [before] and signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
