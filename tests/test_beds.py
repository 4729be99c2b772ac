"""Test beds of the evidence page in miniature: what is held out, what counts as right, vectors of images, a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from b3.data.tables import embedded_root, embedded_teacher
from benchmarks.evidence import drawings, emoji, labels, tables
from benchmarks.evidence.beds import DONE, Bed, Pair, Question, as_item, write_bed
from benchmarks.evidence.grid import expand
from benchmarks.evidence.icons import LANGUAGES, SETS, TAGGED, plain_name
from benchmarks.evidence.measure import bed_ranks
from benchmarks.evidence.results import Results, collect
from benchmarks.evidence.run import execute_missing
from benchmarks.evidence.students import SMALL, make_heads
from benchmarks.evidence.wordnet import hashed_ngrams
from benchmarks.wordnet import read_synsets

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")


def means(texts: list[str]) -> dict[int, np.ndarray]:
    return {2: hashed_ngrams(texts, 24), 6: hashed_ngrams(texts, 32)}


def rows(count: int = 60) -> dict[str, list[Pair]]:
    """Rows of four data sets about the same names, one drawing each in two sets."""
    found: dict[str, list[Pair]] = {"name": [], "search": [], "vendor": [], "tags": []}
    for i in range(count):
        name = f"{COLOURS[i % 8]} thing {chr(97 + i // 8)}"
        one, other, text = ("", f"one/{i}"), ("", f"other/{i}"), (f"tag{i}, {COLOURS[i % 8]}", "")
        found["name"].append(Pair(one, (name, ""), (name,)))
        found["search"].append(Pair((f"{name}, tag{i}", ""), other, (name,)))
        found["vendor"].append(Pair(one, other, (name,)))
        found["tags"].append(Pair(text, (name, ""), (name,)))
    return found


def contents_of(pairs: dict[str, list[Pair]]) -> list[tuple[Any, Any]]:
    return [side for listed in pairs.values() for pair in listed for side in (pair.query, pair.target)]


def test_no_held_out_name_is_in_training() -> None:
    everything = rows()
    held = drawings.hold_out(everything)
    bed = drawings.make_bed(everything, held, test=8)
    assert len(held) == 12
    assert not held & {name for pairs in bed.train.values() for pair in pairs for name in pair.names}
    asked = [q for part in (bed.test, bed.validation) for questions in part.values() for q in questions]
    assert len(asked) == 4 * len(held) and all(len(questions) == 8 for questions in bed.test.values())
    assert not {q.answer for q in asked} & set(contents_of(bed.train))
    for question in asked:
        assert question.answer in bed.pools[question.pool]
    vendor = bed.test["vendor"][0]
    number = vendor.query[1].removeprefix("one/")
    assert {path for _, path in vendor.right} == {"", f"one/{number}", f"other/{number}"}  # its name and its drawings


def test_a_bed_on_disk_leaves_out_what_is_right_too(tmp_path: Path) -> None:
    contents = [(text, "") for text in ("a", "b", "c", "d", "q")]
    bed = Bed(
        train={"some": [Pair(("q", ""), ("a", ""), ("a",))]},
        test={"some": [Question(("q", ""), ("b", ""), "all", frozenset({("c", ""), ("b", ""), ("elsewhere", "")}))]},
        pools={"all": contents[:4]},
    )
    assert bed.contents() == contents
    vectors = np.asarray([[0, 1], [3, 4], [4, 3], [1, 0], [2, 0]], dtype=np.float32)  # q is nearest to d, then c, b, a
    write_bed(tmp_path, bed, {"2": vectors}, {"full": vectors})
    make_heads(tmp_path / "student", tmp_path / "vectors-2")
    make_heads(tmp_path / "student", tmp_path / "vectors-2")
    with pytest.raises(RuntimeError, match="heads of another size than 1 of 512"):
        make_heads(tmp_path / "student", tmp_path / "vectors-2", *SMALL)
    assert bed_ranks(str(tmp_path / "student"), tmp_path)["some"].tolist() == [1]  # d alone is above b
    teacher = np.load(tmp_path / "teachers/full/some_targets.npy")
    assert teacher.tolist() == [[0, 1]]


def test_images_are_mapped_as_the_normal_equations_say() -> None:
    random = np.random.default_rng(0)
    features, texts = random.normal(size=(50, 7)) * 3 + 1, random.normal(size=(50, 4))
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-6)
    # a ridge regression is least squares with rows sqrt(strength n) I, targets 0
    rows_of_ridge = np.concatenate([scaled, np.sqrt(2.0 * 50) * np.eye(7)])
    weights = np.linalg.lstsq(rows_of_ridge, np.concatenate([texts, np.zeros((7, 4))]), rcond=None)[0]
    predicted = scaled @ weights
    expected = predicted / np.linalg.norm(predicted, axis=1, keepdims=True)
    assert np.allclose(drawings.into_texts(features, texts, strength=2.0)(features), expected)
    basis = np.linalg.svd(scaled, full_matrices=False)[2][:3].T
    found = drawings.components(features, 3)(features)
    own = scaled @ basis / np.linalg.norm(scaled @ basis, axis=1, keepdims=True)
    assert np.allclose(np.abs(found), np.abs(own))


def synsets(count: int) -> list[dict[str, Any]]:
    """A tree of nouns and one of verbs, each a kind of the one at a quarter of its number."""
    return [
        {
            "id": f"{i}-{part}",
            "class": 5 + i % 3 if part == "noun" else 30 + i % 3,
            "lemmas": [f"{part} {i}", f"also {i % 97}"],
            "definition": f"what {part} {i} means",
            "examples": [],
            "hypernyms": [f"{i // 4}-{part}"] if i else [],
        }
        for part in ("noun", "verb")
        for i in range(count)
    ]


def test_labels_hold_out_lemmas_and_know_all_ancestors() -> None:
    some = synsets(600)
    aliases = [(f"other {i // 2}", f"icon {chr(97 + i // 20)}{i % 20} {'outline' if i % 2 else ''}".strip())
               for i in range(200)]  # fmt: skip
    bed = labels.make_bed(some, aliases, scale=0.02)
    by_text = {s["definition"]: s for s in some}
    kinds = ("noun_kind", "verb_kind", "class")
    held = {lemma for kind in kinds for q in (*bed.test[kind], *bed.validation[kind])
            for lemma in by_text[q.query[0]]["lemmas"]}  # fmt: skip
    trained = {lemma for kind in kinds for pair in bed.train[kind] for lemma in by_text[pair.query[0]]["lemmas"]}
    assert held and trained and not held & trained
    for question in bed.test["noun_kind"]:
        number, right = int(question.query[0].split()[2]), set()
        while number:
            number //= 4
            right.add((f"noun {number}", ""))
        assert question.right == right and question.answer in right
        assert question.answer == (f"noun {int(question.query[0].split()[2]) // 4}", "")
    assert len(bed.pools["classes"]) == 45 == len(set(bed.pools["classes"]))
    assert {pair.target[0] for pair in bed.train["class"]} <= set(labels.CLASSES)
    asked = (*bed.test["alias"], *bed.validation["alias"])
    assert not {plain_name(q.answer[0]) for q in asked} & {plain_name(p.target[0]) for p in bed.train["alias"]}
    assert not {q.query for q in asked} & {p.query for p in bed.train["alias"]}
    assert all(len(q.right) == 2 for q in asked)  # both styles


def test_hypernyms_are_read_from_the_dictionary(tmp_path: Path) -> None:
    line = (
        "02086723 05 n 02 dog 0 domestic_dog 0 003 @ 02085998 n 0000 @i 01320032 n 0000 #m 02086515 n 0000"
        ' | a member of the genus Canis; "the dog barked all night"\n'
    )
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 licence\n" + (line if part == "noun" else ""))
    (found,) = read_synsets(tmp_path)
    assert found["hypernyms"] == ["02085998-noun", "01320032-noun"]
    assert found["lemmas"] == ["dog", "domestic dog"] and found["examples"] == ["the dog barked all night"]


def test_icons_are_read_out_of_packages(tmp_path: Path) -> None:
    def package(name: str, version: str, **files: Any) -> None:
        folder = tmp_path / f"{name.lstrip('@').replace('/', '-')}-{version}"
        for file, tree in files.items():
            place = folder / file.replace("__", "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_suffix(".json").write_text(json.dumps(tree))

    for name, version in SETS.items():
        is_emoji = name in drawings.EMOJI
        icons = ["dog-face", "flag-chad"] if is_emoji else ["bell", "bell-outline", "a-b-c-d", "lock-2"]
        tree = {"icons": {icon: {"body": "<path/>"} for icon in icons}, "width": 24, "height": 24}
        chars = {"1f436": "dog-face", "1f1f9-1f1e9": "flag-chad"} if is_emoji else {}
        package(f"@iconify-json/{name}", version, icons=tree, chars=chars)
    package(*TAGGED["mdi"], meta=[{"name": "bell", "aliases": ["notification"]}])
    package(*TAGGED["tabler"], icons={"bell": {"tags": ["alarm", 7]}})
    package(*TAGGED["lucide"], tags={"bell": ["alarm"]})
    package(
        "@fortawesome/fontawesome-free", "7.3.1", **{"metadata__icon-families": {"dog": {"search": {"terms": ["pet"]}}}}
    )
    for language in LANGUAGES:
        entries = [{"hexcode": "1F436", "label": f"dog face {language}", "tags": ["pet"], "group": 3},
                   {"hexcode": "1F1F9-1F1E9", "label": "flag: Chad", "group": 9}]  # fmt: skip
        package("emojibase-data", "17.0.0", **{f"{language}__compact": entries})
    found = drawings.read(tmp_path)
    assert found.shown["mdi", "bell"] == "mdi/bell" and found.shown["ph", "lock"] == "ph/lock-2"
    assert not any("a-b-c-d" in path or "flag" in path for path in found.drawings)
    assert 'viewBox="0 0 24 24"><path/>' in found.drawings["mdi/bell"]
    listed = drawings.rows_of(found)
    assert {p.query[0] for p in listed["search"] if p.names == ("bell",)} == {"bell, notification", "bell, alarm, 7"}
    assert Pair(("", "noto/dog-face"), ("", "twemoji/dog-face"), ("dog face en",)) in listed["vendor"]
    texts = {p.query[0] for p in listed["tags"]}
    assert {"pet", "alarm", "dog face de, pet"} <= texts and "dog face en, pet" not in texts
    assert {p.target[0] for p in listed["name"]} == {"bell", "lock"}


def test_a_run_on_drawings_and_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, everything = tmp_path / "root", rows(160)
    held = drawings.hold_out(everything)
    bed = drawings.make_bed(everything, held, test=10)
    random = np.random.default_rng(0)
    paths = sorted({path for _, path in bed.contents() if path})
    start = [(f"start/{i}", f"{colour} start") for i, colour in enumerate(COLOURS)]
    features = {path: random.normal(size=9) for path in [*paths, *(path for path, _ in start)]}
    drawings.write_drawings(root / "drawings", bed, start, features, means, count=4)
    make_heads(root / "drawings" / "student", root / "drawings" / "vectors-2")
    vectors = np.load(root / "drawings" / "vectors-2" / "vectors.npy")
    is_text = np.abs(vectors[:, -4:]).sum(1) == 0
    assert vectors.shape[1] == 24 + 4 and is_text.sum() == len({text for text, _ in bed.contents()}) - 1
    grid = {
        "seeds": 1,
        "defaults": {"recipe": "benchmarks/evidence/base_drawings.yaml", "small": True, "size": 16, "examples": 64,
                     "lr_at_64": 1e-3, "lr_power": 0.5},
        "axes": {"small": {True: ["mining.p=2", "mining.m=8", "mining.k=4"]},
                 "arm": {"random": ["batch.policy=random"],
                         "b3_mixed_4": ["batch.policy=b3_mixed", "negatives.per_query=4"]}},
        "questions": {"drawn": {"parts": [{"arm": ["random", "b3_mixed_4"]}]}},
    }  # fmt: skip
    questions = expand(grid, str(root))
    assert execute_missing(questions["drawn"], 1, lambda text: None) == []
    assert collect(root, questions, tmp_path / "results.json", "here") == 0
    results = Results(tmp_path / "results.json")
    whole = results.cell("drawn", arm="random")
    assert whole is not None and whole.values.shape == (1, 40) and 0 < whole.mean < 1
    parts = [results.cell("drawn", part=name, arm="random") for name in bed.train]
    assert whole.mean == pytest.approx(np.mean([cell.mean for cell in parts if cell is not None]))
    validation = results.cell("drawn", part="validation", arm="random")
    assert validation is not None and validation.values.shape == (1, 4 * (len(held) - 10))
    lines = tables.by_part(results, "drawn", control="random").splitlines()
    assert lines[0] == "| arm | name | search | vendor | tags |" and lines[3].startswith("| b3_mixed_4 − random |")
    tests = json.loads((root / "drawings" / DONE).read_text())
    query, pool, answer, right = tests["test"]["search"][0]
    number = tests["pools"][pool][answer][1].removeprefix("other/")
    assert query[0].endswith(f"tag{number}") and [tests["pools"][pool][i][1] for i in right] == []
    assert as_item(("", "one/1"), root / "drawings").image is not None


def test_emoji_on_which_settings_are_chosen_are_not_trained_on(tmp_path: Path) -> None:
    emoji.prepare(tmp_path)
    held: dict[bool, set[str]] = {True: set(), False: set()}
    for subset in emoji.SUBSETS:
        whole = pq.read_table(embedded_root("emoji") / "train" / f"{subset}.parquet").to_pylist()
        kept = pq.read_table(tmp_path / "train" / f"{subset}.parquet").to_pylist()
        asked = pq.read_table(tmp_path / "test" / f"{subset}.parquet").to_pylist()
        assert len(kept) + len(asked) == len(whole) and len(asked) > 100
        of_scenes = subset in emoji.SCENE_SETS
        names = {Path(row["qry_img_path"] or row["tgt_img_path"][0]).stem for row in asked}
        held[of_scenes] |= names
        assert not held[of_scenes] & {Path(row["qry_image_path"] or row["pos_image_path"]).stem for row in kept}
        rows_of = {(r["qry"], r["qry_image_path"], r["pos_text"], r["pos_image_path"]) for r in whole}
        for row in asked:
            candidates = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
            assert len(set(candidates)) == len(candidates) >= 20
            right = [(row["qry_text"], row["qry_img_path"], *candidate) in rows_of for candidate in candidates]
            assert right[0] and not any(right[1:])
        queries, _ = embedded_teacher("emoji", subset)
        places = [i for i, row in enumerate(whole) if row in kept]
        assert np.array_equal(np.load(tmp_path / "teacher" / f"{subset}_queries.npy"), queries[places])
