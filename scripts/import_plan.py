"""Import the authors' released mined files as a batch plan.

    python scripts/import_plan.py FILES... --data SOURCE --subset NAME --out DIR [--split original] [-k 32]

FILES are the parquet files of one data set, in order. SOURCE is the data that training will read, as data.source of a
recipe. To train on the plan: DIR is the folder NAME in mining.dir of a recipe whose mining.community_size is K.

Their parquet files hold the rows of a data set in blocks of K: rows kK to kK + K - 1 are community k; `neg_text` and
`neg_image_path` are lists of hard negatives; target prefixes may be applied already. Where a last community was short,
their script filled it with copies of the data set's first rows, so a few rows occur twice.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3.data.datasets import PairDataset
from b3.data.prompts import target_prefix
from b3.data.tables import NEGATIVE_COLUMNS, PAIR_COLUMNS, check_rows, load_table
from b3.errors import DataError, RunError, command
from b3.mining.plan import BatchPlan

if TYPE_CHECKING:
    import pyarrow as pa

Key = tuple[str, ...]


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
    table = read_released(arguments.files)
    where = f"{arguments.data} subset {arguments.subset} split {arguments.split}"
    rows = check_rows(load_table(arguments.data, arguments.subset, arguments.split), PAIR_COLUMNS, where)
    prefix = "" if arguments.no_target_prefix else target_prefix(arguments.subset)
    dataset = PairDataset(arguments.subset, rows, target_prefix=prefix)
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


def read_released(files: Sequence[str | Path]) -> pa.Table:
    """The rows of released parquet files in the order given. Raises `DataError` naming the file or column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            table = pq.read_table(file)
        except FileNotFoundError:
            raise DataError(f"{file} does not exist") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from None
        tables.append(check_rows(table, PAIR_COLUMNS, str(file)))
    first = tables[0].schema
    for file, table in zip(files, tables, strict=True):
        if table.schema != first:
            raise DataError(f"{file} has other columns or types than {files[0]}; import files of one data set")
    return pa.concat_tables(tables)


def import_released(
    table: pa.Table, dataset: PairDataset, community_size: int = 32, files: Sequence[str] = ()
) -> BatchPlan:
    """The plan that released rows describe, for the data set that they were made from.

    Rows are found by content (query, positive, their image paths; target prefixes apart); equal rows of the data set
    are taken in order. A community with copies is dissolved: its own rows go to the remainder, like rows that the
    files do not have, so the remainder may exceed K. A hard negative is given as the first row that has it as target.

    `table` is that of `read_released`, `dataset` in the order that training will see, `community_size` K of the files;
    `files` are names for the manifest.

    The report counts: rows_missing (in the data but not in the files), copies, copies_of_other_rows (not among the
    data set's first K, which the authors' script never makes), communities_dissolved, negatives,
    negatives_not_targets (no row has them as target) and negatives_empty.

    Raises:
        DataError: K does not divide the rows, a row is not in the data set, or most communities hold copies.
    """
    if community_size < 1 or table.num_rows % community_size:
        raise DataError(
            f"{table.num_rows} rows are no multiple of the community size {community_size}; give all files of the"
            " data set, or the K of its folder name (bs32: 32)"
        )
    prefix = target_prefix(dataset.name)
    columns = {name: dataset.column(name) for name in PAIR_COLUMNS}
    rows, is_copy = _match(_keys(table.to_pydict(), prefix), _keys(columns, prefix), community_size, dataset)
    is_whole = np.logical_not(is_copy.reshape(-1, community_size).any(axis=1))
    if 2 * (~is_whole).sum() > len(is_whole) or not is_whole.any():
        raise DataError(
            f"{(~is_whole).sum()} of {len(is_whole)} communities hold rows that occur more often than in"
            f" {dataset.name}; check the community size {community_size} and that the files are of one data set"
        )
    communities = np.sort(rows.reshape(-1, community_size)[is_whole], axis=1)
    communities = communities[np.argsort(communities[:, 0])]
    remainder = np.setdiff1d(np.arange(len(dataset)), communities)
    negatives, facts = _negatives(table, dataset, rows, is_copy, prefix)
    report = {
        "n": len(dataset),
        "community_size": community_size,
        "num_communities": len(communities),
        "num_remainder": len(remainder),
        "rows_missing": len(dataset) - len(np.unique(rows[~is_copy])),
        "copies": int(is_copy.sum()),
        "copies_of_other_rows": int((rows[is_copy] >= community_size).sum()),
        "communities_dissolved": int((~is_whole).sum()),
        **facts,
        "size_min": community_size,
        "size_max": community_size,
    }
    manifest = {
        "data_fingerprint": dataset.fingerprint(),
        "teacher": None,
        "imported": [Path(file).name for file in files],
        "N": len(dataset),
        "community_size": community_size,
        "hard_negatives": 0 if negatives is None else negatives.shape[1],
    }
    return BatchPlan(communities, remainder, negatives, report, manifest)


def _target_key(text: str | None, path: str | None, prefix: str) -> Key:
    path = (path or "").removeprefix("./").lstrip("/")
    return (text or "") if path else (text or "").removeprefix(prefix), path


def _keys(columns: dict[str, list[Any]], prefix: str) -> list[Key]:
    """What tells rows apart: query text and image, positive text (without prefix) and image."""
    rows = zip(*(columns[name] for name in PAIR_COLUMNS), strict=True)
    return [(*_target_key(q, qi, ""), *_target_key(t, ti, prefix)) for q, qi, t, ti in rows]


def _match(
    released: list[Key], known: list[Key], community_size: int, dataset: PairDataset
) -> tuple[np.ndarray, np.ndarray]:
    """(row of the data set for each released one, int64; which of them are copies, bool)."""
    rows_of: dict[Key, list[int]] = defaultdict(list)
    for row, key in enumerate(known):
        rows_of[key].append(row)
    places_of: dict[Key, list[int]] = defaultdict(list)
    for place, key in enumerate(released):
        places_of[key].append(place)
    unknown = [places for key, places in places_of.items() if key not in rows_of]
    if unknown:
        place = min(places[0] for places in unknown)
        shown = " | ".join(part[:60] for part in released[place] if part)
        raise DataError(
            f"{sum(map(len, unknown))} of {len(released)} rows are not in {dataset.name}, first row {place}"
            f" ({shown!r}); check --data, --subset and the split"
        )
    # A filled community holds many rows that occur too often, their originals are scattered over others.
    suspects = np.zeros(len(released) // community_size, dtype=np.int64)
    for key, places in places_of.items():
        if len(places) > len(rows_of[key]):
            np.add.at(suspects, np.asarray(places) // community_size, 1)
    rows, is_copy = np.empty(len(released), dtype=np.int64), np.zeros(len(released), dtype=bool)
    for key, places in places_of.items():
        originals = rows_of[key]
        places = sorted(places, key=lambda place: (suspects[place // community_size], place))
        rows[places], is_copy[places[len(originals) :]] = originals[0], True
        rows[sorted(places[: len(originals)])] = originals[: len(places)]
    return rows, is_copy


def _negatives(
    table: pa.Table, dataset: PairDataset, rows: np.ndarray, is_copy: np.ndarray, prefix: str
) -> tuple[np.ndarray | None, dict[str, int]]:
    """((N, h) row numbers whose targets are the negatives, -1 for none; counts for the report)."""
    if NEGATIVE_COLUMNS[0] not in table.column_names:
        return None, {"negatives": 0}
    first: dict[Key, int] = {}
    for row, key in enumerate(zip(dataset.column("pos_text"), dataset.column("pos_image_path"), strict=True)):
        first.setdefault(_target_key(*key, prefix), row)
    counts = {"negatives": 0, "negatives_not_targets": 0, "negatives_empty": 0}
    ids: list[list[int]] = []
    columns = (table.column(name).to_pylist() for name in NEGATIVE_COLUMNS)
    for place, (texts, paths) in enumerate(zip(*columns, strict=True)):
        texts, paths = ([value] if not isinstance(value, list) else value for value in (texts, paths))
        if len(texts) != len(paths):
            raise DataError(f"row {place}: neg_text has {len(texts)} entries, neg_image_path {len(paths)}")
        keys = [_target_key(text, path, prefix) for text, path in zip(texts, paths, strict=True)]
        counts["negatives_empty"] += sum(not any(key) for key in keys)
        counts["negatives"] += sum(any(key) for key in keys)
        counts["negatives_not_targets"] += sum(any(key) and key not in first for key in keys)
        ids.append([first.get(key, -1) if any(key) else -1 for key in keys])
    width = max(map(len, ids))
    if not counts["negatives"]:
        return None, counts
    negatives = np.full((len(dataset), width), -1, dtype=np.int64)
    for place in np.flatnonzero(~is_copy).tolist():
        negatives[rows[place], : len(ids[place])] = ids[place]
    return negatives, counts


if __name__ == "__main__":
    sys.exit(main())
