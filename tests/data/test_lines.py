"""Rows of a jsonl file by number, against reading all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b3.data import lines
from b3.data.lines import Lines
from b3.errors import InputError

rows = st.lists(
    st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=9), st.integers(), st.none())), max_size=9
)


@settings(max_examples=80, deadline=None)
@given(rows, st.booleans(), st.booleans(), st.sampled_from([1, 2, 7, 1 << 24]))
def test_rows_are_those_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, Any]], is_ascii: bool, ends: bool, block: int
) -> None:
    file = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in given]
    file.write_bytes("\n".join([*texts, ""] if ends else texts).replace("{}", "{}\n").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = Lines(file)
    assert len(found) == len(given)
    assert list(found) == given
    assert list(found.texts()) == texts
    assert list(found[1:]) == given[1:]
    assert not given or found[-1] == given[-1]
    with pytest.raises(IndexError):
        found[len(given)]


@pytest.mark.parametrize("bad", [b'{"a": ', b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_line_is_named_by_its_place_and_the_others_are_read(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 3}\n')
    found = Lines(file)
    assert (found[0], found[2]) == ({"a": 1}, {"a": 3})
    with pytest.raises(InputError, match="is damaged at byte 9"):
        found[1]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"")
    assert list(Lines(tmp_path / "rows.jsonl")) == []
