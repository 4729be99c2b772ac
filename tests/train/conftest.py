"""Runs of these tests do not draw the figures of their pages, which is half of their time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forks import undrawn


@pytest.fixture(autouse=True, scope="module")
def no_drawings() -> Iterator[None]:
    """Drawn are those of `test_outputs`, of some recipes in `test_debug`, and of programs started from a shell."""
    with undrawn():
        yield
