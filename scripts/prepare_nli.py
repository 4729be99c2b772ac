"""Turn the NLI triples of supervised SimCSE (nli_for_simcse.csv: sent0, sent1, hard_neg) into training pairs.

    python scripts/prepare_nli.py nli_for_simcse.csv --out data/nli/nli.jsonl

The annotated negative of each row is kept as neg_text.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from b3.errors import DataError, command
from b3.files import write_text

COLUMNS = ("sent0", "sent1", "hard_neg")


def read_triples(file: Path) -> Iterator[tuple[str, str, str]]:
    """(premise, entailed sentence, contradicting sentence) of each row. Raises `DataError` naming file and row."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; fetch SimCSE's nli_for_simcse.csv first")
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{file}: column(s) {', '.join(missing)} missing; expected {', '.join(COLUMNS)}")
        for row in reader:
            texts = tuple((row[name] or "").strip() for name in COLUMNS)
            if not all(texts):
                raise DataError(f"{file}:{reader.line_num}: a sentence is empty; correct or drop the row")
            yield texts[0], texts[1], texts[2]


def to_line(query: str, target: str, negative: str) -> str:
    row = {"qry": query, "qry_image_path": "", "pos_text": target, "pos_image_path": ""}
    return json.dumps({**row, "neg_text": negative, "neg_image_path": ""}, ensure_ascii=False) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="nli_for_simcse.csv")
    parser.add_argument("--out", type=Path, required=True, help="jsonl file to write")
    arguments = parser.parse_args(argv)
    lines = [to_line(*triple) for triple in read_triples(arguments.csv)]
    write_text(arguments.out, "".join(lines))
    print(f"wrote {len(lines):,} pairs to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
