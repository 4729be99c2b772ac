"""Fetch MMEB from the hub and extract its images, so that it can be trained on and evaluated.

    python scripts/prepare_mmeb.py eval  --out data/mmeb-eval  [--subsets N24News CIRR ...]
    python scripts/prepare_mmeb.py train --out data/mmeb-train [--source FOLDER_LAID_OUT_LIKE_THE_HUB]

Run it again to continue after an interruption. The folder then serves as --dataset_name (or data.source) and as
--image_dir (or data.image_dir). The zip archives may be deleted afterwards.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from b3.console import num_bytes
from b3.data import mmeb
from b3.errors import DataError, command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(mmeb.REPOSITORIES), help="which data set")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--source", type=Path, help="local folder laid out like the hub's; nothing is downloaded")
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: main)")
    return parser


def make_plan(arguments: argparse.Namespace, repository: str) -> mmeb.Plan:
    """What has to be done; prints the bytes it takes and refuses when they do not fit."""
    source, out = arguments.source, arguments.out
    files = mmeb.list_source(source) if source else mmeb.list_hub(repository, arguments.revision)
    plan = mmeb.select(files, arguments.subsets, str(source or repository))
    mmeb.measure(plan, out, source, arguments.subsets)
    verb = "to copy" if source else "to download"
    about = "about " if plan.estimated else ""
    print(
        f"{repository}: {len(plan.parquets)} parquet files, {len(plan.zips)} archives to extract,"
        f" {len(plan.done)} extracted before"
    )
    needed = plan.download + plan.extract
    place = f"{num_bytes(plan.download)} {verb}, {about}{num_bytes(plan.extract)} to extract"
    print(f"{place}; {num_bytes(mmeb.check_space(out, needed))} free", flush=True)
    return plan


def report_missing(out: Path, plan: mmeb.Plan) -> None:
    """Print a line a subset. Raises `DataError` naming the first image that is missing."""
    first, total = "", 0
    for subset, (looked, missing) in mmeb.missing_images(out, plan.parquets).items():
        state = f"{len(missing)} MISSING, first {missing[0]}" if missing else "all there"
        print(f"{subset:24} {looked:>4} image paths looked up, {state}" if looked else f"{subset:24} no images")
        if missing:
            first, total = first or f"{subset}: {missing[0]}", total + len(missing)
    if total:
        raise DataError(
            f"{total} of the image paths looked up are not below {out}, the first of {first};"
            f" delete {out / mmeb.MARKERS} and run the same command again"
        )


@command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    repository, out = mmeb.REPOSITORIES[arguments.part], arguments.out
    plan = make_plan(arguments, repository)
    if arguments.source:
        mmeb.copy_parquets(plan, arguments.source, out)
    elif plan.download:
        mmeb.download(repository, plan.files, out, arguments.revision)
    wanted = mmeb.image_paths(out / file.path for file in plan.parquets) if plan.zips else set()
    archives = {file: (arguments.source or out) / file.path for file in plan.zips}
    if plan.estimated:  # the archives have come since: now their directories tell the real size
        after = mmeb.Plan(plan.parquets, list(plan.zips))
        mmeb.measure(after, out, arguments.source, arguments.subsets)
        mmeb.check_space(out, after.extract)
    for file, archive in archives.items():
        written = mmeb.extract(archive, out, file, wanted, arguments.subsets, progress=True)
        print(f"{file.path}: {written} files extracted", flush=True)
    report_missing(out, plan)
    print(f"ready: --dataset_name {out} --image_dir {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
