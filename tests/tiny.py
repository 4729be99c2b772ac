"""Small real things that several tests need: a tiny model, a data set with images, a recipe over them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

if TYPE_CHECKING:
    import torch

    from b3 import Embedder
    from b3.train.inputs import StepInputs
    from b3.train.step import CachedStep

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]
SHAPES = ["square", "disc", "bar", "frame"]
QUERY = "<|image_1|>\nRepresent the given image for classification\n"


def image(colour: str, shape: str, seed: int) -> bytes:
    """A PNG of a shape on a grey ground, 56 to 84 pixels per side."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    side = int(rng.integers(56, 85))
    image = Image.new("RGB", (side, side), (128, 128, 128))
    draw, a, b = ImageDraw.Draw(image), int(rng.integers(5, 15)), int(rng.integers(40, 50))
    if shape == "square":
        draw.rectangle((a, a, b, b), fill=colour)
    elif shape == "disc":
        draw.ellipse((a, a, b, b), fill=colour)
    elif shape == "bar":
        draw.rectangle((a, a, a + 8, b), fill=colour)
    else:
        draw.rectangle((a, a, b, b), outline=colour, width=5)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_data(root: Path, rows: int = 96) -> Path:
    """Two subsets in the layout of the hub: `pictures` (image to caption) and `words` (text to text)."""
    rng = np.random.default_rng(0)
    names, images, captions = [], [], []
    for i in range(rows):
        colour, shape = COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
        names.append(f"{i:04}.png")
        images.append(image(colour, shape, i))
        captions.append(f"a {colour} {shape} number {i}")
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"path": names, "bytes": images}), root / "images.parquet", row_group_size=16)
    empty = [""] * rows
    subsets = {
        "pictures": {"qry": [QUERY] * rows, "qry_image_path": names, "pos_text": captions, "pos_image_path": empty},
        "words": {
            "qry": [f"what is {c}?\n" for c in captions],
            "qry_image_path": empty,
            "pos_text": [c.split(" number")[0] for c in captions],
            "pos_image_path": empty,
        },
    }
    for name, columns in subsets.items():
        (root / name).mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), root / name / "train-00000-of-00001.parquet")
        test = {
            "qry_text": columns["qry"][:10],
            "qry_img_path": columns["qry_image_path"][:10],
            "tgt_text": [[columns["pos_text"][i], "nothing at all", f"candidate {i}"] for i in range(10)],
            "tgt_img_path": [["", "", ""]] * 10,
        }
        pq.write_table(pa.table(test), root / name / "test-00000-of-00001.parquet")
    return root


def write_model(folder: Path) -> Path:
    """A checkpoint of a few hundred thousand parameters."""
    from b3.model.backbones.tiny import make_tiny_model

    texts = [f"a {c} {s} number 0123456789 what is Represent the given image" for c in COLOURS for s in SHAPES]
    return make_tiny_model(folder, texts, hidden=32, layers=2, vision_layers=1, vocab_size=400)


def write_text_model(folder: Path, kind: str = "roberta", **options: Any) -> Path:
    """A text encoder of a hundred thousand parameters."""
    from b3.model.backbones.tiny import make_tiny_text_model

    texts = [f"a {c} {s} number 0123456789 what is Represent the given image" for c in COLOURS for s in SHAPES]
    return make_tiny_text_model(folder, texts, kind=kind, vocab_size=400, **options)


def write_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes vectors."""
    import torch

    from b3 import Embedder
    from b3.model.adapter import AdapterSpec, attach_adapter

    model = Embedder.from_pretrained(base, dtype="float32")
    spec = AdapterSpec(r=4, dropout=0.0, use_dora=True, target_modules=model.adapter_targets)
    model.backbone = attach_adapter(model.backbone, spec)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    model.save(folder)
    return folder


def write_teacher(root: Path, rows: int = 96) -> None:
    """Vectors of a teacher who knows nothing, for the first rows of `write_data`, where `recipe` looks for them."""
    rng = np.random.default_rng(0)
    (root / "teacher").mkdir()
    for name in ("pictures", "words"):
        for side in ("queries", "targets"):
            np.save(root / "teacher" / f"{name}_{side}.npy", rng.normal(size=(rows, 8)).astype(np.float32))


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over `write_data` and `write_model` below `root`; `changes` are sections laid over it."""
    from b3.config.load import merge

    base = {
        "name": "test",
        "output_dir": str(root / "run"),
        "model": {"name": str(root / "model"), "dtype": "float32"},
        "adapter": {"r": 4, "alpha": 16, "dropout": 0.0, "use_dora": False},
        "data": {
            "source": f"parquet:{root / 'data'}",
            "image_dir": str(root / "data" / "images.parquet"),
            "datasets": [{"subset": "pictures"}, {"subset": "words"}],
        },
        "mining": {"dir": str(root / "mining"), "teacher": str(root / "teacher"), "p": 2, "m": 10, "k": 4},
        "batch": {"size": 12, "policy": "random"},
        "train": {"steps": 6, "lr": 1e-2, "chunk_tokens": 128, "save_every": 2},
    }
    return merge(base, changes)


def write_recipe(root: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    file = root / name
    file.write_text(yaml.safe_dump(recipe(root, **changes)))
    return file


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the machine, equal for runs that are to be equal."""
    timed = "pairs_per_second tokens_per_second waiting_for_data peak_memory_bytes tflops_per_rank mfu seconds".split()
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def matched_modules(wrapped: Any) -> list[str]:
    """Names of the modules that carry an adapter, sorted."""
    names = [name for name, _ in wrapped.named_modules() if name.endswith(".lora_A")]
    return sorted(name.removesuffix(".lora_A").removeprefix("base_model.model.") for name in names)


def gradients(model: Embedder) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.backbone.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_one_graph(step: CachedStep, inputs: StepInputs) -> float:
    """Loss and gradients of step 0 by one graph over all chunks, each under its own random state."""
    import torch

    from b3.train.vision_cache import VisionCache

    placed, chunks, groups = step._placed(inputs)
    cache = VisionCache(step.embedder, placed.images, 0)
    vectors = torch.cat([step._embed(chunk, i, 0, cache) for i, chunk in enumerate(chunks)])
    vectors = torch.zeros_like(vectors).index_copy(0, torch.cat(groups), vectors)
    means, gradient = step._loss(vectors.detach(), placed)
    vectors.backward(gradient)
    return means[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
