"""Items per second and peak memory of encoding: ours, the published loop, and sentence-transformers.

    python benchmarks/encode.py [--size tiny|100m] [--texts 192] [--images 24] [--rounds 3] [--arms ours,published,st]

The same random weights, with the real vocabulary of 151,936 rows, and the same items for every arm: a mix of short and
long texts and photos of several sizes, a part of them repeated as in MMEB (labels and candidate images repeat). Each
measurement is a process of its own, the arms take turns, ratios are of medians. The published loop is the reference's:
batches of 4 in path order, left padding, one process, full-vocabulary logits and all hidden states kept.
sentence-transformers computes upstream's 3-D positions, hence other vectors for images.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

SIZES = {
    "tiny": {"hidden": 128, "layers": 2, "heads": 4, "vision_layers": 2, "embedding_rows": 151936},
    "100m": {"hidden": 512, "layers": 10, "heads": 8, "vision_layers": 8, "embedding_rows": 151936},
}
IMAGES = ((64, 64), (224, 224), (320, 240), (500, 375), (375, 500), (640, 480))
WORDS = "a red boat on the water near an old stone bridge while two people watch birds fly over quiet hills".split()


def make_items(folder: Path, texts: int, images: int) -> None:
    """items.jsonl of (text, image): a third repeats; image sizes and text lengths of MMEB's order."""
    from PIL import Image

    rng = np.random.default_rng(0)
    distinct: list[dict[str, Any]] = []
    for i in range(texts * 2 // 3):
        count = int(rng.choice([2, 3, 12, 20, 45]))
        distinct.append({"text": " ".join(rng.choice(WORDS, count)) + f" {i}\n", "image": None})
    for i in range(images * 2 // 3):
        size = IMAGES[i % len(IMAGES)]
        noise = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"{i:04}.jpg", quality=90)
        distinct.append({"text": "<|image_1|>\nRepresent the given image.\n", "image": str(folder / f"{i:04}.jpg")})
    again = [distinct[int(i)] for i in rng.integers(0, len(distinct), texts + images - len(distinct))]
    items = distinct + again
    rng.shuffle(items)  # type: ignore[arg-type]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def ours(model: Path, items: list[dict[str, Any]]) -> tuple[np.ndarray, float]:
    from b3 import Embedder

    embedder = Embedder.from_pretrained(model, dtype="float32")
    started = time.perf_counter()
    vectors = embedder.encode(items)
    return vectors, time.perf_counter() - started


def published(model: Path, items: list[dict[str, Any]]) -> tuple[np.ndarray, float]:
    """The reference's loop, on upstream's classes: it keeps duplicates out by (text, image) as the reference does."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from b3.data.items import Item
    from b3.model.backbones.qwen_vl_images import CLIP, QwenVLProcessor

    network = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    processor = QwenVLProcessor.from_pretrained(model)
    started = time.perf_counter()
    keys = sorted({(item["text"], item["image"] or "") for item in items}, key=lambda key: key[1])
    rows: dict[tuple[str, str], np.ndarray] = {}
    for start in range(0, len(keys), 4):
        batch = keys[start : start + 4]
        inputs = [processor(Item(text, image or None)) for text, image in batch]
        longest = max(one.num_tokens for one in inputs)
        ids = torch.zeros(len(inputs), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(inputs):
            ids[row, longest - one.num_tokens :] = torch.from_numpy(one.input_ids)
            mask[row, longest - one.num_tokens :] = 1
        images = [visual for one in inputs for visual in one.visuals]
        extra: dict[str, Any] = {}
        if images:
            patches = np.concatenate([visual.patches for visual in images])
            extra["pixel_values"] = CLIP.numbers(torch.from_numpy(patches))
            extra["image_grid_thw"] = torch.tensor([visual.grid for visual in images])
        positions = (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
        with torch.no_grad():
            output = network(
                input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False,
                **extra,
            )  # fmt: skip
        pooled = torch.nn.functional.normalize(output.hidden_states[-1][:, -1], dim=-1).numpy()
        rows.update(zip(batch, pooled, strict=True))
    vectors = np.stack([rows[item["text"], item["image"] or ""] for item in items])
    return vectors, time.perf_counter() - started


def st(model: Path, items: list[dict[str, Any]]) -> tuple[np.ndarray, float]:
    """sentence-transformers over the same backbone; its own batching, padding and processor."""
    from benchmarks.st_backbone import load

    encoder = load(model)
    started = time.perf_counter()
    vectors: list[Any] = [None] * len(items)
    for with_image in (False, True):  # it refuses a call that mixes them
        chosen = [i for i, item in enumerate(items) if (item["image"] is not None) == with_image]
        inputs: list[Any] = [items[i]["text"] for i in chosen]
        if with_image:
            inputs = [
                {"text": items[i]["text"].replace("<|image_1|>", "<|image_pad|>"), "image": items[i]["image"]}
                for i in chosen
            ]
        encoded = encoder.encode(inputs, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
        for i, vector in zip(chosen, encoded, strict=True):
            vectors[i] = vector
    return np.stack(vectors), time.perf_counter() - started


ARMS = {"ours": ours, "published": published, "st": st}


def measure(arm: str, folder: Path) -> None:
    """Run one arm in this process and print a JSON line."""
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    vectors, seconds = ARMS[arm](folder / "model", items)
    np.save(folder / f"{arm}.npy", vectors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "items_per_second": len(items) / seconds, "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="ours,published,st")
    parser.add_argument("--measure", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
        return
    from b3.model.backbones.tiny import make_tiny_model

    arms = arguments.arms.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_items(folder, arguments.texts, arguments.images)
        make_tiny_model(
            folder / "model", [" ".join(WORDS), "Represent the given image.\n 0123456789"], **SIZES[arguments.size]
        )
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for _ in range(arguments.rounds):
            for arm in arms:
                command = [sys.executable, __file__, "--measure", arm, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
                results[arm].append(json.loads(done.stdout.splitlines()[-1]))
        vectors = {arm: np.load(folder / f"{arm}.npy") for arm in arms}
    print(f"{arguments.size}: {arguments.texts} texts, {arguments.images} images, {arguments.rounds} rounds, float32")
    print(
        f"| {'arm':12} | items/s | ratio of ours | peak GiB | largest difference to ours |\n|---|---:|---:|---:|---:|"
    )
    speed = {arm: statistics.median(r["items_per_second"] for r in rounds) for arm, rounds in results.items()}
    for arm, rounds in results.items():
        peak = max(r["peak_gib"] for r in rounds)
        difference = np.abs(vectors[arm] - vectors["ours"]).max()
        print(f"| {arm:12} | {speed[arm]:.1f} | {speed['ours'] / speed[arm]:.2f} | {peak:.2f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
