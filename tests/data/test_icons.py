"""What the student's pretraining data leaves out, so that the emoji data's tests stay unseen."""

from __future__ import annotations

import pytest

from dev.icons import catalog


def test_no_held_out_name_is_kept() -> None:
    held = catalog.held_out_words()
    assert len(held) == 250
    names = [" ".join(sorted(words)) for words in held if words]
    assert all(catalog.is_emoji_to_leave_out(name, held) for name in names)
    assert catalog.is_emoji_to_leave_out("red apple", held)  # held out


@pytest.mark.parametrize("name", ["flag armenia", "thumbs up dark", "woman medium skin tone", ""])
def test_flags_and_skin_tones_are_left_out(name: str) -> None:
    assert catalog.is_emoji_to_leave_out(name, [])


def test_other_names_stay() -> None:
    held = catalog.held_out_words()
    assert not any(catalog.is_emoji_to_leave_out(name, held) for name in ("croissant", "baseball", "light bulb"))


@pytest.mark.parametrize(
    ("name", "text"), [("a-cane-1", "a cane"), ("bell-outline", "bell"), ("Alarm_clock_02", "alarm clock")]
)
def test_names_are_read_as_words(name: str, text: str) -> None:
    assert catalog.readable(name) == text
