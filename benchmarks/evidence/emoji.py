"""The embedded emoji with some of their training rows held out, so that settings are not chosen on the test rows.

Held out: all rows about some concepts in the four subsets of single emoji, all rows of some scenes in the other two.
Wrong candidates are targets of other concepts or scenes that are held out; of `emoji_cls` all its other labels.

    prepare(Path("runs/evidence/emoji"))     copies and cuts b3/data/emoji, in seconds
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CONCEPTS, SCENES = 200, 150
CANDIDATES = {"emoji_vqa": 20, "emoji_vg": 20}  # elsewhere 50
SCENE_SETS = ("emoji_vqa", "emoji_vg")
SUBSETS = ("emoji_t2i", "emoji_i2t", "emoji_i2i", "emoji_cls", *SCENE_SETS)
Row = tuple[str, str, str, str]  # query, its image, target, its image


def about(row: Row) -> str:
    """The concept or the scene that a row is about: the name of its image's file."""
    return Path(row[1] or row[3]).stem


def hold_out(rows: list[Row], count: int, random: np.random.Generator) -> set[str]:
    """Some of the concepts or scenes of a subset's rows."""
    names = sorted({about(row) for row in rows})
    return {names[i] for i in random.permutation(len(names))[:count].tolist()}


def questions(rows: list[Row], count: int, random: np.random.Generator) -> list[tuple[str, str, list[str], list[str]]]:
    """Rows of the schema of MMEB-eval: each row's target first, then targets of rows about something else."""
    about_of: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        about_of.setdefault(row[2:], set()).add(about(row))
    targets = sorted(about_of)
    found = []
    for row in rows:
        drawn = (targets[i] for i in random.permutation(len(targets)).tolist())
        others = [target for target in drawn if about(row) not in about_of[target]]
        texts, paths = zip(row[2:], *others[: count - 1], strict=True)
        found.append((row[0], row[1], list(texts), list(paths)))
    return found


def prepare(folder: Path) -> None:
    """Write train, test and teacher below `folder`; does nothing when they are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from b3.data.tables import PAIR_COLUMNS, embedded_root, embedded_teacher

    if (folder / "test" / f"{SUBSETS[-1]}.parquet").exists():
        return
    for name in ("train", "test", "teacher"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    held: dict[bool, set[str]] = {}
    for subset in SUBSETS:
        table = pq.read_table(embedded_root("emoji") / "train" / f"{subset}.parquet").select(PAIR_COLUMNS)
        rows: list[Row] = list(zip(*table.to_pydict().values(), strict=True))
        of_scenes = subset in SCENE_SETS
        if of_scenes not in held:
            held[of_scenes] = hold_out(rows, SCENES if of_scenes else CONCEPTS, random)
        kept = np.asarray([about(row) not in held[of_scenes] for row in rows])
        pq.write_table(table.filter(pa.array(kept)), folder / "train" / f"{subset}.parquet")
        for side, vectors in zip(("queries", "targets"), embedded_teacher("emoji", subset), strict=True):
            np.save(folder / "teacher" / f"{subset}_{side}.npy", vectors[kept])
        asked = [row for row, keep in zip(rows, kept.tolist(), strict=True) if not keep]
        if subset == "emoji_cls":  # every label is a candidate
            labels = {row[2:]: row for row in rows}
            found = questions([*asked, *labels.values()], len(labels), random)[: len(asked)]
        else:
            found = questions(asked, CANDIDATES.get(subset, 50), random)
        columns = zip(("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), zip(*found, strict=True), strict=True)
        pq.write_table(
            pa.table({name: list(values) for name, values in columns}), folder / "test" / f"{subset}.parquet"
        )
