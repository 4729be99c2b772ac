"""The batch plan: communities and hard negatives of one data set, in memory and as a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from b3 import files
from b3.errors import InputError, gist

FORMAT_VERSION = 2
ARRAYS = ("communities", "remainder", "hard_negatives")
FILES = (*(f"{name}.npy" for name in ARRAYS), "report.json", "report.html", "manifest.json")
INCIDENTAL = ("versions", "seconds", "format_version", "sha256")  # entries of the manifest that tell no plans apart


@dataclass(frozen=True)
class BatchPlan:
    """Which rows of a data set share a batch.

    Attributes:
        communities: (C, K) int64 row numbers; every row number at most once.
        remainder: (R,) int64, the rows that are in no community: N mod K, or those of each subset mined on its own.
        hard_negatives: (N, h) int64, rows whose targets are the hard negatives of each row, -1 where there were too
            few candidates; or None.
        report: what was measured (see `b3.mining.report`).
        manifest: what the plan was made from: parameters, fingerprints, versions.
    """

    communities: np.ndarray
    remainder: np.ndarray
    hard_negatives: np.ndarray | None = None
    report: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """The entries of the manifest that say what the plan was made from."""
        return {key: value for key, value in self.manifest.items() if key not in INCIDENTAL}

    @property
    def measured(self) -> bool:
        """Whether the report has the numbers of `b3.mining.report`; not so for imported plans."""
        return "mined_negatives_per_query" in self.report

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan to `folder`, each file complete and synced before it has its name, the manifest last.

        Raises `InputError` if `folder` holds a plan made from other data or parameters, or something that is no plan.
        """
        folder, remedy = Path(folder), "choose another folder or delete it"
        files.claim(folder, self.identity, "batch plan", remedy, foreign=lambda name: name not in FILES)
        texts = {"report.json": json.dumps(self.report, indent=1, allow_nan=False) + "\n"}
        if self.measured:
            from b3.mining.page import Section, render  # a plan is stored without knowing what it looks like

            texts["report.html"] = render([Section(self.report, self.manifest)])
        if (folder / "manifest.json").exists():
            (folder / "manifest.json").unlink()
            files.sync(folder)  # from here to the last file: no valid plan
        checksums = {}
        for name in ARRAYS:
            file, array = folder / f"{name}.npy", getattr(self, name)
            file.unlink(missing_ok=True)
            if array is not None:
                files.write_array(file, array)
                checksums[file.name] = files.sha256(file)
        for name, text in texts.items():
            files.write_text(folder / name, text)
        manifest = {**self.manifest, "format_version": FORMAT_VERSION, "sha256": checksums}
        files.write_json(folder / "manifest.json", manifest, indent=1, allow_nan=False)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], expect_fingerprint: str | Mapping[str, Any] | None = None
    ) -> BatchPlan:
        """Read a plan and verify it.

        Args:
            folder: a directory written by `save`.
            expect_fingerprint: the data fingerprint that the plan must have, or any manifest entries by name.

        Raises `InputError` naming what is missing, torn or different.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            raise InputError(f"{folder} holds no complete batch plan (no manifest.json); mine it again")
        manifest = _read_json(folder / "manifest.json")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{folder} has plan format {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION};"
                " mine it again"
            )
        if isinstance(expect_fingerprint, str):
            expect_fingerprint = {"data_fingerprint": expect_fingerprint}
        differing = files.changes(manifest, expect_fingerprint or {})
        if differing:
            raise files.belongs_elsewhere(folder, "batch plan", differing.values(), "mine it again")
        arrays = {name: _read_array(folder, f"{name}.npy", manifest["sha256"]) for name in ARRAYS}
        communities, remainder = arrays["communities"], arrays["remainder"]
        if communities is None or remainder is None:
            raise InputError(f"the manifest in {folder} lists no communities.npy or remainder.npy; mine it again")
        report = _read_json(folder / "report.json")
        return cls(communities, remainder, arrays["hard_negatives"], report, manifest)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({str(error).splitlines()[0]}); mine it again") from None
    if not isinstance(content, dict) or (file.name == "manifest.json" and not isinstance(content.get("sha256"), dict)):
        raise InputError(f"{file} is not a file of a batch plan; mine it again")
    return content


def _read_array(folder: Path, name: str, checksums: Mapping[str, str]) -> np.ndarray | None:
    if name not in checksums:
        return None
    file = folder / name
    if not file.exists():
        raise InputError(f"{file} is missing; mine the plan again")
    if files.sha256(file) != checksums[name]:
        raise InputError(f"{file} differs from its checksum in manifest.json (torn or edited); mine the plan again")
    try:
        array: np.ndarray = np.load(file, allow_pickle=False)
    except Exception as error:  # a damaged header is read as Python and may raise anything
        raise InputError(f"{file} is no array ({gist(error)}); mine the plan again") from None
    if array.ndim != 1 + (name != "remainder.npy") or array.dtype.kind != "i":
        raise InputError(f"{file} has shape {array.shape} and type {array.dtype}, not a plan's; mine it again")
    return array


def describe_plans(plans: Mapping[str, BatchPlan]) -> str:
    """A line per plan, under its name."""
    width, lines = max(map(len, plans)), []
    for name, plan in plans.items():
        report = plan.report
        line = f"{name:{width}}  {report['n']:>7,} rows  {len(plan.communities):>6,} communities"
        if not plan.measured:
            lines.append(f"{line}, imported")
            continue
        lines.append(
            f"{line} of {report['community_size']}  mined negatives per query"
            f" {report['mined_negatives_per_query']:.2f} (random {report['random_mined_negatives_per_query']:.2f})"
            f"  {sum(report['seconds'].values()):.1f} s"
        )
    return "\n".join(lines)
