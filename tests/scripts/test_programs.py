"""The programs as a user starts them: by path, from another folder, with nothing on PYTHONPATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

USING_OTHERS = sorted(
    file.stem
    for file in (ROOT / "scripts").glob("*.py")
    if "from scripts" in file.read_text() and file.stem != "own_data"
)


@pytest.mark.parametrize("name", USING_OTHERS)
def test_a_program_finds_the_programs_it_uses(name: str, tmp_path: Path) -> None:
    """own_data is not started by path: the command b3 runs it."""
    program = (
        "import runpy, sys; sys.path[0] = sys.argv[1]; runpy.run_path(sys.argv[2], run_name='loaded'); "
        "import scripts.serve, scripts.embed"
    )
    folder = ROOT / "scripts"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(folder / f"{name}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_those_programs_are_known() -> None:
    assert USING_OTHERS == ["demo", "prepare_mmeb", "search"]
