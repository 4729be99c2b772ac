"""What the reference program recorded on a made-up MMEB-V2 folder, unpacked once (tests/golden/mmeb_v2/README.md)."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from golden_data import GOLDEN


@pytest.fixture(scope="session")
def golden_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden_v2")
    with tarfile.open(GOLDEN / "mmeb_v2" / "reference.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder
