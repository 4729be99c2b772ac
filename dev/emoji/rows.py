"""Rows of the six subsets, in MMEB's schemas, and the content that the teacher embeds for each side."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dev.emoji.catalog import VENDORS, Concept
from dev.emoji.scenes import NUMBERS, Question, Scene, ask

IMAGE = "<|image_1|>"
IMAGE_TARGET = f"{IMAGE}\nRepresent the given image.\n"
CROP_TARGET = f"{IMAGE}\nRepresent the given cropped image of the object"
I2T_QUERY = f"{IMAGE}\nFind an image caption describing the given emoji.\n"
I2I_QUERY = f"{IMAGE}\nFind an emoji from another vendor that shows the same thing as the provided image.\n"
CLS_QUERY = f"{IMAGE}\nRepresent the given image for classification\n"
FAMILIES = {
    "emoji_t2i": "retrieval",
    "emoji_i2t": "retrieval",
    "emoji_i2i": "retrieval",
    "emoji_cls": "classification",
    "emoji_vqa": "vqa",
    "emoji_vg": "grounding",
}
RETRIEVAL_CANDIDATES = 50
SCENE_CANDIDATES = 20
PER_SCENE = 2

Content = tuple[str, str, str]
Pair = tuple[str, str]


@dataclass
class Subset:
    """Train rows, test rows, and for each train row what the teacher sees: (kind, text, image path) of both sides."""

    train: list[tuple[str, str, str, str]] = field(default_factory=list)
    test: list[tuple[str, str, list[str], list[str]]] = field(default_factory=list)
    contents: list[tuple[Content, Content]] = field(default_factory=list)

    def add(self, query: Pair, target: Pair, contents: tuple[Content, Content]) -> None:
        """One training row."""
        self.train.append((*query, *target))
        self.contents.append(contents)

    def add_test(self, query: Pair, targets: Sequence[Pair]) -> None:
        """One test row; `targets` starts with the positive. Raises ValueError if a candidate is repeated."""
        if len(set(targets)) != len(targets):
            raise ValueError(f"repeated candidate for {query}")
        self.test.append((*query, [t for t, _ in targets], [p for _, p in targets]))


def t2i_query(caption: str) -> str:
    """Text of a caption-to-image query."""
    return f"Find me an emoji that matches the given caption: {caption}\n"


def vqa_query(question: str) -> str:
    """Text of a question about an image."""
    return f"{IMAGE}\nRepresent the given image with the following question: {question}\n"


def vg_query(name: str) -> str:
    """Text of a grounding query."""
    return f'{IMAGE}\nSelect the portion of the image that isolates the object labeled as "{name}"\n'


def _text(text: str) -> Content:
    return ("text", text, "")


def _image(path: str) -> Content:
    return ("image", "", path)


def concept_pairs(concept: Concept, vendor: str) -> dict[str, tuple[Pair, Pair, Content, Content]]:
    """(query, target, teacher content of each) of the four subsets that are about single emoji."""
    path = concept.path(vendor)
    other = concept.path(VENDORS[1 - VENDORS.index(vendor)])
    caption, image = _text(concept.caption), _image(path)
    return {
        "emoji_t2i": ((t2i_query(concept.caption), ""), (IMAGE_TARGET, path), caption, image),
        "emoji_i2t": ((I2T_QUERY, path), (concept.caption, ""), image, caption),
        "emoji_i2i": ((I2I_QUERY, path), (IMAGE_TARGET, other), image, _image(other)),
        "emoji_cls": ((CLS_QUERY, path), (concept.label, ""), image, _text(concept.label)),
    }


def _negatives(concept: Concept, held: list[Concept], rng: random.Random) -> list[Concept]:
    """Other held-out concepts; a third of them from the same category."""
    count = RETRIEVAL_CANDIDATES - 1
    near = [c for c in held if c.category == concept.category and c.code != concept.code]
    negatives = rng.sample(near, min(len(near), count // 3))
    codes = {concept.code, *(c.code for c in negatives)}
    negatives += rng.sample([c for c in held if c.code not in codes], count - len(negatives))
    rng.shuffle(negatives)
    return negatives


def add_concept_rows(subsets: dict[str, Subset], train: list[Concept], held: list[Concept], seed: int) -> None:
    """Fill the four single-emoji subsets."""
    for concept in train:
        for vendor in VENDORS:
            for name, (query, target, *contents) in concept_pairs(concept, vendor).items():
                subsets[name].add(query, target, (contents[0], contents[1]))
    labels = sorted({c.label for c in train})
    for concept in held:
        for vendor in VENDORS:
            for name, (query, target, *_) in concept_pairs(concept, vendor).items():
                if name == "emoji_cls":
                    others = [(label, "") for label in labels if label != concept.label]
                else:
                    rng = random.Random(f"{seed}/{name}/{vendor}/{concept.code}")
                    others = [concept_pairs(c, vendor)[name][1] for c in _negatives(concept, held, rng)]
                subsets[name].add_test(query, [target, *others])


def add_question_rows(subset: Subset, train: list[Scene], test: list[Scene], pool: list[Concept], seed: int) -> None:
    """Fill the question subset."""
    for scene in train:
        for question in ask(scene, pool, seed, PER_SCENE):
            query = (vqa_query(question.text), scene.path)
            content = ("question", question.text, scene.path)
            subset.add(query, (question.answer, ""), (content, _text(question.answer)))
    questions = [question for scene in test for question in ask(scene, pool, seed, PER_SCENE)]
    for number, question in enumerate(questions):
        answers = _answers(question, pool, random.Random(f"{seed}/answers/{number}"))
        subset.add_test((vqa_query(question.text), question.scene.path), [(a, "") for a in answers])


def _answers(question: Question, pool: list[Concept], rng: random.Random) -> list[str]:
    """The right answer and 19 wrong ones of the same kind; for yes/no the rest is of the other kinds."""
    if question.kind == "number":
        wrong = [n for n in NUMBERS if n != question.answer]
        rng.shuffle(wrong)
        return [question.answer, *wrong]
    in_scene = sorted({o.concept.name for o in question.scene.objects} - {question.answer})
    first = ["no" if question.answer == "yes" else "yes"] if question.kind == "truth" else []
    by_label = {c.name: c.label for c in pool}
    excluded = {question.answer, *in_scene}
    near = [c.name for c in pool if c.label == by_label.get(question.answer) and c.name not in excluded]
    wrong = first + in_scene + rng.sample(near, min(len(near), 6))
    names = [c.name for c in pool if c.name not in {question.answer, *wrong}]
    wrong += rng.sample(names, SCENE_CANDIDATES - 1 - len(wrong))
    rng.shuffle(wrong)
    return [question.answer, *wrong]


def add_grounding_rows(
    subset: Subset, train: list[Scene], test: list[Scene], crop: Callable[[Scene, int], str], seed: int
) -> None:
    """Fill the grounding subset; `crop` stores the crop of an object and returns its path."""
    for scene in train:
        rng = random.Random(f"{seed}/grounding/{scene.number}")
        unique = scene.unique()
        for index in sorted(rng.sample(unique, min(PER_SCENE, len(unique)))):
            name, path = scene.objects[index].concept.name, crop(scene, index)
            contents = ("phrase", name, scene.path), _image(path)
            subset.add((vg_query(name), scene.path), (CROP_TARGET, path), contents)
    crops: dict[int, dict[str, str]] = defaultdict(dict)
    for scene in test:
        for index, thing in enumerate(scene.objects):
            if thing.concept.code not in crops[scene.number]:
                crops[scene.number][thing.concept.code] = crop(scene, index)
    for scene in test:
        rng = random.Random(f"{seed}/grounding/{scene.number}")
        unique = scene.unique()
        for index in sorted(rng.sample(unique, min(PER_SCENE, len(unique)))):
            right = scene.objects[index].concept
            paths = _crops(right.code, scene, crops, rng)
            subset.add_test((vg_query(right.name), scene.path), [(CROP_TARGET, p) for p in paths])


def _crops(code: str, scene: Scene, crops: dict[int, dict[str, str]], rng: random.Random) -> list[str]:
    """The right crop, the other objects of the scene, then crops of other scenes; each concept once."""
    path_of = dict(crops[scene.number])
    others = [(c, p) for n in sorted(crops) if n != scene.number for c, p in sorted(crops[n].items())]
    rng.shuffle(others)
    for other, path in others:
        if len(path_of) == SCENE_CANDIDATES:
            break
        path_of.setdefault(other, path)
    right = path_of.pop(code)
    wrong = list(path_of.values())
    rng.shuffle(wrong)
    return [right, *wrong]
