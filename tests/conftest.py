"""Test processes share two cores and never look at the network."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def golden_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What reference programs recorded on a made-up MMEB-V2 folder, unpacked once (tests/golden/mmeb_v2/README.md)."""
    folder = tmp_path_factory.mktemp("golden_v2")
    with tarfile.open(Path(__file__).parent / "golden" / "mmeb_v2" / "reference.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def one_tokenizer() -> Iterator[None]:
    """Models of one folder share a tokenizer, whose vocabulary is nine tenths of what a tiny model takes to load."""
    from golden_data import tokenizers_once

    with tokenizers_once():
        yield
