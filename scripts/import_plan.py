"""Import the authors' released mined files as a batch plan.

    python scripts/import_plan.py FILES... --data SOURCE --subset NAME --out DIR [--split original] [-k 32]

FILES are the parquet files of one data set, in order. SOURCE is the data that training will read, as data.source of a
recipe. To train on the plan: DIR is the folder NAME in mining.dir of a recipe whose mining.k is K.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from b3.errors import RunError, command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILES", help="released parquet files, in order")
    parser.add_argument("--data", required=True, help="source line of the data: hub:OWNER/NAME, parquet:PATH, ...")
    parser.add_argument("--subset", required=True, help="name of the data set")
    parser.add_argument("--split", default="original", help="split of the data (default original)")
    parser.add_argument("--out", type=Path, required=True, help="plan directory to write")
    parser.add_argument("-k", "--community-size", type=int, default=32, help="K of the files (default 32)")
    parser.add_argument("--no-target-prefix", action="store_true", help="for recipes with data.prefix_targets false")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if (arguments.out / "manifest.json").exists():
        raise RunError(f"{arguments.out} holds a batch plan already; choose another --out or delete it")
    from b3.data.datasets import PairDataset
    from b3.data.prompts import target_prefix
    from b3.data.tables import PAIR_COLUMNS, check_rows, load_table
    from b3.mining.released import import_released, read_released

    table = read_released(arguments.files)
    where = f"{arguments.data} subset {arguments.subset} split {arguments.split}"
    own = check_rows(load_table(arguments.data, arguments.subset, arguments.split), PAIR_COLUMNS, where)
    prefix = "" if arguments.no_target_prefix else target_prefix(arguments.subset)
    dataset = PairDataset(arguments.subset, own, target_prefix=prefix)
    plan = import_released(table, dataset, arguments.community_size, arguments.files)
    plan.save(arguments.out)
    r = plan.report
    print(
        f"{arguments.out}: {r['num_communities']:,} communities of {r['community_size']}, {r['num_remainder']:,} of"
        f" {r['n']:,} rows left over ({r['rows_missing']:,} not in the files, {r['communities_dissolved']} communities"
        f" dissolved for {r['copies']} copies)"
    )
    if r["copies_of_other_rows"]:
        print(f"note: {r['copies_of_other_rows']} copies are not of the data set's first {r['community_size']} rows")
    if r["negatives"]:
        print(
            f"{r['negatives']:,} hard negatives, {r['negatives_not_targets']:,} of them no row's target (left out),"
            f" {r['negatives_empty']:,} empty ones"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
