"""Items per second and peak memory of encoding: ours, the published loop, and sentence-transformers.

    python benchmarks/encode.py [--size tiny|100m|2b] [--device cpu|cuda] [--texts 192] [--images 24] [--rounds 3]

The same random weights, with the real vocabulary of 151,936 rows, and the same items for every arm: a mix of short and
long texts and photos of several sizes, a part of them repeated as in MMEB (labels and candidate images repeat). Each
measurement is a process of its own, the arms take turns, ratios are of medians. The published loop is the reference's:
batches of 4 in path order, left padding, one process, full-vocabulary logits and all hidden states kept.
sentence-transformers computes upstream's 3-D positions, hence other vectors for images. float32 on a CPU; on a GPU
bfloat16, and the peak is of the GPU's memory. 2b: the published shape, random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

SIZES = {
    "tiny": {"hidden": 128, "layers": 2, "heads": 4, "vision_layers": 2, "embedding_rows": 151936},
    "100m": {"hidden": 512, "layers": 10, "heads": 8, "vision_layers": 8, "embedding_rows": 151936},
}
SHAPES = {"2b": "qwen2_vl_2b.json"}  # published ones, of benchmarks/shapes
Items = Sequence[dict[str, Any]]
Encode = Callable[[Items], np.ndarray]
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


def write_model(folder: Path, size: str, texts: list[str], device: str) -> None:
    """The random checkpoint of a size."""
    from b3.model.backbones.tiny import make_tiny_model
    from benchmarks import random_checkpoint

    if size in SHAPES:
        random_checkpoint.write(folder, Path(__file__).parent / "shapes" / SHAPES[size], texts, device)
    else:
        make_tiny_model(folder, texts, **SIZES[size])


def dtype_on(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


def peak_gib(device: str) -> float:
    """Of this process: resident memory, or what was allocated on the GPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(model: Path, device: str) -> Encode:
    from b3 import Embedder

    embedder = Embedder.from_pretrained(model, dtype=dtype_on(device), device=device)
    workers = 0 if device == "cpu" else min(12, os.cpu_count() or 1)
    return lambda items: embedder.encode(items, workers=workers)


def published(model: Path, device: str) -> Encode:
    """The reference's loop, on upstream's classes: it keeps duplicates out by (text, image) as the reference does."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from b3.data.items import Item
    from b3.model.backbones.qwen_vl_images import CLIP, QwenVLProcessor

    network = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype_on(device))).eval()
    network.to(device)
    processor = QwenVLProcessor.from_pretrained(model)

    def encode(items: Items) -> np.ndarray:
        keys = sorted({(item["text"], item["image"] or "") for item in items}, key=lambda key: key[1])
        rows: dict[tuple[str, str], np.ndarray] = {}
        for start in range(0, len(keys), 4):
            batch = keys[start : start + 4]
            processed = [processor(Item(text, image or None)) for text, image in batch]
            longest = max(one.num_tokens for one in processed)
            ids = torch.zeros(len(processed), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, one in enumerate(processed):
                ids[row, longest - one.num_tokens :] = torch.from_numpy(one.input_ids)
                mask[row, longest - one.num_tokens :] = 1
            positions = (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            images = [visual for one in processed for visual in one.visuals]
            if images:
                patches = np.concatenate([visual.patches for visual in images])
                inputs["pixel_values"] = CLIP.numbers(torch.from_numpy(patches))
                inputs["image_grid_thw"] = torch.tensor([visual.grid for visual in images])
            moved: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
            with torch.no_grad():
                states = network(**moved, output_hidden_states=True, use_cache=False).hidden_states[-1]
            pooled = torch.nn.functional.normalize(states[:, -1].float(), dim=-1).cpu().numpy()
            rows.update(zip(batch, pooled, strict=True))
        return np.stack([rows[item["text"], item["image"] or ""] for item in items])

    return encode


def st(model: Path, device: str) -> Encode:
    """sentence-transformers over the same backbone; its own batching, padding and processor."""
    from benchmarks.st_backbone import load

    encoder = load(model, device, dtype_on(device))

    def encode(items: Items) -> np.ndarray:
        vectors: list[Any] = [None] * len(items)
        for with_image in (False, True):  # it refuses a call that mixes them
            chosen = [i for i, item in enumerate(items) if (item["image"] is not None) == with_image]
            inputs: list[Any] = [items[i]["text"] for i in chosen]
            if with_image:
                inputs = [
                    {"text": items[i]["text"].replace("<|image_1|>", "<|image_pad|>"), "image": items[i]["image"]}
                    for i in chosen
                ]
            if not inputs:
                continue
            encoded = encoder.encode(inputs, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
            for i, vector in zip(chosen, encoded, strict=True):
                vectors[i] = vector
        return np.stack(vectors)

    return encode


ARMS: dict[str, Callable[[Path, str], Encode]] = {"ours": ours, "published": published, "st": st}


def measure(arm: str, folder: Path, device: str) -> None:
    """Run one arm in this process and print a JSON line."""
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    encode = ARMS[arm](folder / "model", device)
    if device != "cpu":
        encode(items[:16])  # loads kernels; ours starts its workers' server
    started = time.perf_counter()
    vectors = encode(items)
    seconds = time.perf_counter() - started
    np.save(folder / f"{arm}.npy", vectors)
    speed = len(items) / seconds
    print(json.dumps({"seconds": seconds, "items_per_second": speed, "peak_gib": peak_gib(device)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SIZES, *SHAPES), default="100m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="ours,published,st")
    parser.add_argument("--measure", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]), arguments.device)
        return
    arms = arguments.arms.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_items(folder, arguments.texts, arguments.images)
        texts = [" ".join(WORDS), "Represent the given image.\n 0123456789"]
        write_model(folder / "model", arguments.size, texts, arguments.device)
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for _ in range(arguments.rounds):
            for arm in arms:
                command = [sys.executable, __file__, "--measure", arm, str(folder), "--device", arguments.device]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
                results[arm].append(json.loads(done.stdout.splitlines()[-1]))
        vectors = {arm: np.load(folder / f"{arm}.npy") for arm in arms}
    print(
        f"{arguments.size}: {arguments.texts} texts, {arguments.images} images, {arguments.rounds} rounds, "
        f"{dtype_on(arguments.device)} on {arguments.device}"
    )
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
