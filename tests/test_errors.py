"""How a command ends on a mistake of the user: one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from b3.errors import DataError, command
from b3.files import write_text


def lines_of(main: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert command(main)() == 2
    return capsys.readouterr().err.splitlines()


def test_an_input_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise DataError("row 3 is empty; drop it")

    assert lines_of(main, capsys) == ["error: row 3 is empty; drop it"]


def test_a_folder_that_cannot_be_written_is_one_line_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "run"
    (line,) = lines_of(lambda: write_text(path / "config.yaml", "x"), capsys)
    assert line == f"error: {path}: Not a directory; check the path and its permissions"


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    def main() -> None:
        raise OSError("a library's own")

    with pytest.raises(OSError, match="a library's own"):
        command(main)()
