"""Evaluations of these tests read the tokenizer of a model once."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def tokenizer_is_read_once(one_tokenizer: None) -> None: ...
