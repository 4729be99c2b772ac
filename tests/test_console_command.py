"""The command `b3` is the programs under one name."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import b3
from b3.__main__ import PROGRAMS, main


def test_version_names_what_numbers_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    import transformers

    assert main(["--version"]) == 0
    line = capsys.readouterr().out
    parts = f"b3 {b3.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    assert line.startswith(parts) and line.count("\n") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_command_is_its_program(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["b3"])
    monkeypatch.setattr(import_module(PROGRAMS[name]), "main", lambda argv: seen.append(argv) or 3)
    assert main([name, "--some", "flag"]) == 3 and seen == [["--some", "flag"]]
    assert sys.argv[0] == f"b3 {name}"


def test_help_lists_all_and_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"b3 {name} " in text for name in PROGRAMS)
    assert main(["serch"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no command 'b3 serch'; choose from mine, train, eval, embed, search, export\n"
    )


def test_it_starts_from_anywhere_and_is_an_entry_point(tmp_path: Path) -> None:
    root = Path(b3.__file__).resolve().parents[1]
    assert '[project.scripts]\nb3 = "b3.__main__:run"\n' in (root / "pyproject.toml").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "b3", "search", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: b3 search ")
