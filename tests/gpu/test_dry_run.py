"""The dry run on a pretend GPU, in a process of its own: torch takes a new device only before its first backward pass.

To see one case: pytest tests/gpu/step_on_device.py -k NAME
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_dry_run() -> None:
    files = sorted(map(str, HERE.glob("*_on_device.py")))
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=HERE.parents[1])
    if "registers no device from Python" in done.stdout:
        pytest.skip(done.stdout[-1000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
