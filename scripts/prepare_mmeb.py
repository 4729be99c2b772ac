"""Fetch MMEB from the hub and extract its images, so that it can be trained on and evaluated.

    python scripts/prepare_mmeb.py eval  --out data/mmeb-eval  [--subsets N24News CIRR ...]
    python scripts/prepare_mmeb.py train --out data/mmeb-train [--source FOLDER_LAID_OUT_LIKE_THE_HUB]

    python scripts/prepare_mmeb.py eval-v2 --out data/mmeb-v2 [--tasks MSVD V-QA visdoc ...]

Run it again to continue after an interruption. The folder then serves as --dataset_name (or data.source) and as
--image_dir (or data.image_dir). The zip archives may be deleted afterwards.

The hub's layout is `<subset>/<split>-*.parquet` and zip archives of images: `images.zip`, or `images_zip/<subset>.zip`.
Files get their name only when complete, and a marker of each archive in `.extracted/` says that it is done. MMEB-V2
(eval-v2) lies in many repositories, see scripts/prepare_mmeb_v2.py: OUT/hub is --dataset_name, OUT/data --data_basedir.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the programs beside it

from b3.console import num_bytes
from b3.data.archives import (
    MARKERS,
    RemoteFile,
    extract,
    is_there,
    marked,
    members,
    targets_of,
    unwritable,
)
from b3.data.copies import GROWTH, check_space, download, image_paths, list_hub, list_source
from b3.errors import DataError, InputError, command
from b3.files import atomic, tidy

REPOSITORIES = {"eval": "TIGER-Lab/MMEB-eval", "train": "TIGER-Lab/MMEB-train"}
SAMPLE = 500


@dataclass
class Plan:
    """What a run would do: the files to take, and the bytes that this needs."""

    parquets: list[RemoteFile]
    zips: list[RemoteFile]
    done: list[RemoteFile] = field(default_factory=list)
    download: int = 0
    extract: int = 0
    estimated: bool = False

    @property
    def files(self) -> list[RemoteFile]:
        return self.parquets + self.zips


def select(files: Iterable[RemoteFile], subsets: Sequence[str] | None, where: str) -> Plan:
    """The parquets and archives that belong to `subsets` (None: all).

    An archive is left out only if it carries the name of another subset; any other may be shared. Raises `InputError`
    naming a subset that does not exist.
    """
    listed = [(f, PurePosixPath(f.path)) for f in files]
    parquets = [(f, p) for f, p in listed if p.suffix == ".parquet" and len(p.parts) == 2]
    known = sorted({p.parts[0] for _, p in parquets})
    if not known:
        raise InputError(f"{where} has no <subset>/<split>*.parquet; it is not laid out like MMEB")
    unknown = [s for s in subsets or () if s not in known]
    if unknown:
        raise InputError(f"subset '{unknown[0]}' is not in {where}; there is: {', '.join(known)}")
    names = set(subsets or known)
    others = {other for other in set(known) - names if not any(name.startswith(f"{other}_") for name in names)}
    zips = [f for f, p in listed if p.suffix.lower() == ".zip" and p.stem not in others]
    return Plan([f for f, p in parquets if p.parts[0] in names], zips)


def measure(plan: Plan, out: Path, source: Path | None, subsets: Sequence[str] | None) -> None:
    """Fill in what is done, and the bytes still to download or copy and to extract."""
    pending: list[RemoteFile] = []
    for file in plan.zips:
        (plan.done if marked(out, file, subsets) else pending).append(file)
    plan.zips = pending
    rows = [(source or out) / file.path for file in plan.parquets]
    paths = image_paths(rows) if pending and all(path.is_file() for path in rows) else None
    for file in plan.files:
        here = out / file.path
        complete = here.is_file() and here.stat().st_size == file.size
        is_zip = file in pending
        if not complete and not (is_zip and source is not None):
            plan.download += file.size
        if is_zip:
            archive = (source or out) / file.path
            if archive.is_file() and archive.stat().st_size == file.size:
                plan.extract += _bytes_left(archive, out, paths, subsets)
            else:
                plan.extract += int(file.size * GROWTH)
                plan.estimated = True


def _bytes_left(archive: Path, out: Path, paths: set[str] | None, subsets: Sequence[str] | None) -> int:
    """Bytes that extracting takes; `paths` are those of the images that the rows name, None: not known yet."""
    infos = members(archive)
    if paths is None:
        return sum(info.file_size for info in infos)
    targets = targets_of(infos, archive.stem, paths, subsets)
    return sum(info.file_size for info, path in targets if not is_there(out, info, path))


def copy_parquets(plan: Plan, source: Path, out: Path) -> None:
    """Copy the parquets of a local source below `out`, skipping those there with the right size."""
    for file in plan.parquets:
        target = out / file.path
        if target.is_file() and target.stat().st_size == file.size:
            continue
        try:
            with atomic(target) as stream, (source / file.path).open("rb") as original:
                shutil.copyfileobj(original, stream)
        except OSError as error:
            raise unwritable(target, error) from None


def missing_images(out: Path, parquets: Iterable[RemoteFile]) -> dict[str, tuple[int, list[str]]]:
    """Of each subset: how many image paths were looked up (a spread sample), and those that are not below `out`."""
    by_subset: dict[str, list[Path]] = {}
    for file in parquets:
        by_subset.setdefault(PurePosixPath(file.path).parts[0], []).append(out / file.path)
    result = {}
    for subset, files in sorted(by_subset.items()):
        paths = sorted(image_paths(files))
        sample = paths[:: max(1, -(-len(paths) // SAMPLE))]
        result[subset] = len(sample), [path for path in sample if not (out / path).is_file()]
    return result


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*REPOSITORIES, "eval-v2"), help="which data set")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="of eval-v2: tasks, groups or modalities")
    parser.add_argument("--source", type=Path, help="local folder laid out like the hub's; nothing is downloaded")
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: main)")
    return parser


def make_plan(arguments: argparse.Namespace, repository: str) -> Plan:
    """What has to be done; prints the bytes it takes and refuses when they do not fit."""
    source, out = arguments.source, arguments.out
    files = list_source(source) if source else list_hub(repository, arguments.revision)
    plan = select(files, arguments.subsets, str(source or repository))
    measure(plan, out, source, arguments.subsets)
    verb = "to copy" if source else "to download"
    about = "about " if plan.estimated else ""
    print(
        f"{repository}: {len(plan.parquets)} parquet files, {len(plan.zips)} archives to extract,"
        f" {len(plan.done)} extracted before"
    )
    needed = plan.download + plan.extract
    place = f"{num_bytes(plan.download)} {verb}, {about}{num_bytes(plan.extract)} to extract"
    print(f"{place}; {num_bytes(check_space(out, needed))} free", flush=True)
    return plan


def report_missing(out: Path, plan: Plan) -> None:
    """Print a line per subset. Raises `DataError` naming the first image that is missing."""
    first, total = "", 0
    for subset, (looked, missing) in missing_images(out, plan.parquets).items():
        state = f"{len(missing)} MISSING, first {missing[0]}" if missing else "all there"
        print(f"{subset:24} {looked:>4} image paths looked up, {state}" if looked else f"{subset:24} no images")
        if missing:
            first, total = first or f"{subset}: {missing[0]}", total + len(missing)
    if total:
        raise DataError(
            f"{total} of the image paths looked up are not below {out}, the first of {first};"
            f" delete {out / MARKERS} and run the same command again"
        )


@command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.part == "eval-v2":
        from scripts.prepare_mmeb_v2 import prepare

        return prepare(arguments)
    if arguments.tasks:
        raise InputError(f"--tasks is for eval-v2; of {arguments.part} choose --subsets")
    repository, out = REPOSITORIES[arguments.part], arguments.out
    plan = make_plan(arguments, repository)
    if plan.download or plan.zips:
        tidy(out)
    if arguments.source:
        copy_parquets(plan, arguments.source, out)
    elif plan.download:
        download(repository, plan.files, out, arguments.revision)
    paths = image_paths(out / file.path for file in plan.parquets) if plan.zips else set()
    archives = {file: (arguments.source or out) / file.path for file in plan.zips}
    if plan.estimated:  # the archives have come since: now their directories tell the real size
        after = Plan(plan.parquets, list(plan.zips))
        measure(after, out, arguments.source, arguments.subsets)
        check_space(out, after.extract)
    for file, archive in archives.items():
        written = extract(archive, out, file, paths, arguments.subsets, progress=True)
        print(f"{file.path}: {written} files extracted", flush=True)
    report_missing(out, plan)
    print(f"ready: --dataset_name {out} --image_dir {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
