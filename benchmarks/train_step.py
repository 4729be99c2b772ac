"""Pairs per second and peak memory of a training step: ours, sentence-transformers' cached loss, the plain recipe.

    python benchmarks/train_step.py [--size tiny|100m|2b] [--device cpu|cuda] [--sizes 64,256,1024] [--rounds 3]

One step on each of three batches of |B| pairs: images to captions (a quarter of the images come twice, as in
caption data sets), captions to images, and images to class labels (one label for four images). The same random
weights, the same LoRA adapter on the language model (dropout 0), the same images and texts; loss and gradients, no
optimiser. Inputs are prepared before the clock starts, as workers do. Ours and sentence-transformers take chunks of at
most `--chunk-tokens`; the recipe takes chunks of `--chunk-items`. Each measurement is a process of its own, the arms
take turns, ratios are of medians. sentence-transformers computes upstream's 3-D positions, hence another loss.

float32 on a CPU; on a GPU bfloat16 weights under bfloat16 autocast, every arm with torch's attention, and memory is the
GPU's. The arms `eager` (ours, not compiled) and `paper` (ours with the paper's adapter: DoRA, dropout 0.1) are for one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.encode import SHAPES, SIZES, WORDS, dtype_on, peak_gib, write_model

IMAGES = ((112, 112), (224, 168), (224, 224), (320, 240))
PHOTOS = ((640, 480), (480, 640), (640, 427), (500, 375))  # of COCO, for published shapes
QUESTION = "<|image_1|>\nRepresent the given image for classification\n"
CAPTION = "<|image_1|>\nFind an image caption describing the given everyday image.\n"
WANTED = "Find me an everyday image that matches the given caption.\n"
Side = dict[str, Any]
Batch = tuple[list[Side], list[Side]]
Prepare = Callable[[Batch], Callable[[], float]]  # inputs of a batch, then one step on them
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")  # the paper's


def make_batches(folder: Path, size: int, images: tuple[tuple[int, int], ...] = IMAGES) -> list[Batch]:
    """(queries, targets) of {text, image} of the three tasks; images are written to `folder`."""
    from PIL import Image

    rng = np.random.default_rng(size)

    def image(name: str) -> str:
        file = folder / f"{name}.jpg"
        width, height = images[int(rng.integers(len(images)))]
        noise = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(file, quality=90)
        return str(file)

    def text(number: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.choice([8, 12, 20, 40])))) + f" {number}"

    captions: list[Side] = [{"text": text(i), "image": None} for i in range(size)]
    shown = [image(f"c{i}") for i in range(size * 3 // 4)]
    shown += shown[: size - len(shown)]
    found = [image(f"r{i}") for i in range(size)]
    labels: list[Side] = [
        {"text": f"{WORDS[i % len(WORDS)]} {i % max(1, size // 4)}", "image": None} for i in range(size)
    ]
    return [
        ([{"text": CAPTION, "image": name} for name in shown], captions),
        ([{**c, "text": WANTED + c["text"]} for c in captions], [{"text": "<|image_1|>\n", "image": n} for n in found]),
        ([{"text": QUESTION, "image": image(f"l{i}")} for i in range(size)], labels),
    ]


def ours(model: Path, options: Any, compiled: bool = True, paper: bool = False) -> Prepare:
    import torch

    from b3 import Embedder
    from b3.data.items import Item
    from b3.model.adapter import AdapterSpec, attach_adapter
    from b3.model.compiled import compile_layers
    from b3.train.inputs import StepCollator
    from b3.train.losses.info_nce import InfoNCE
    from b3.train.metrics import step_flops
    from b3.train.step import CachedStep

    class Pairs:
        def __init__(self, batch: Batch) -> None:
            self.batch = batch

        def query(self, row: int) -> Item:
            return Item(**self.batch[0][row])

        def target(self, row: int) -> Item:
            return Item(**self.batch[1][row])

    embedder = Embedder.from_pretrained(model, dtype=dtype_on(options.device), device=options.device)
    plain = AdapterSpec(dropout=0.0, use_dora=False, target_modules=TARGETS)
    embedder.backbone = attach_adapter(embedder.backbone, AdapterSpec(target_modules=TARGETS) if paper else plain)
    embedder.train()
    how = compile_layers(embedder.compiled_layers(), "auto" if compiled else False, torch.device(options.device))
    kernel = embedder.attention_kernel(options.device == "cuda")
    print(f"layers: {how}; attention: {kernel}", file=sys.stderr)
    step = CachedStep(
        embedder,
        InfoNCE(mask_duplicates=False),
        autocast=options.device == "cuda",
        kept_chunks=options.kept_chunks,
    )

    def prepare(batch: Batch) -> Callable[[], float]:
        collator = StepCollator([Pairs(batch)], embedder.processor, options.chunk_tokens)  # type: ignore[list-item]
        inputs = collator([(0, row) for row in range(len(batch[0]))])
        FLOPS.append(step_flops(embedder.cost(), inputs))
        return lambda: step(inputs, 0).loss

    return prepare


def _inject(backbone: Any) -> None:
    """The same adapter on the language model inside someone else's module."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=64, target_modules=list(TARGETS)), backbone)
    backbone.train()


def st(model: Path, options: Any) -> Prepare:
    import torch
    from PIL import Image
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from benchmarks.st_backbone import load

    encoder = load(model, options.device, dtype_on(options.device))
    _inject(encoder[0].model)
    loss = CachedMultipleNegativesRankingLoss(encoder, scale=50.0, mini_batch_num_tokens=options.chunk_tokens)

    def features(side: list[Side]) -> dict[str, Any]:
        if side[0]["image"] is None:
            return encoder.preprocess([one["text"] for one in side])
        text = [one["text"].replace("<|image_1|>", "<|image_pad|>") for one in side]
        return encoder.preprocess(
            [{"text": t, "image": Image.open(s["image"])} for t, s in zip(text, side, strict=True)]
        )

    def prepare(batch: Batch) -> Callable[[], float]:
        columns = [features(side) for side in batch]
        half = torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")

        def run() -> float:
            moved = [
                {k: v.to(options.device) if hasattr(v, "to") else v for k, v in column.items()} for column in columns
            ]
            with half:
                value = loss(moved, None)
                value.backward()
            return float(value)

        return run

    return prepare


def recipe(model: Path, options: Any) -> Prepare:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from b3.data.items import Item
    from b3.model.backbones.qwen_vl_images import QwenVLProcessor
    from benchmarks import gradcache_recipe

    dtype = getattr(torch, dtype_on(options.device))
    network = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype).model.to(options.device)
    _inject(network)
    processor = QwenVLProcessor.from_pretrained(model)

    def prepare(batch: Batch) -> Callable[[], float]:
        sides = [gradcache_recipe.padded([processor(Item(**one)) for one in side]) for side in batch]
        return lambda: gradcache_recipe.step(network, sides, options.chunk_items)

    return prepare


FLOPS: list[float] = []  # of the batches that `ours` has prepared
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
ARMS: dict[str, Callable[[Path, Any], Prepare]] = {
    "ours": ours,
    "eager": partial(ours, compiled=False),
    "paper": partial(ours, paper=True),
    "paper_eager": partial(ours, compiled=False, paper=True),
    "st": st,
    "recipe": recipe,
}


def measure(arm: str, size: int, folder: Path, options: Any) -> None:
    """Run one arm in this process and print a JSON line."""
    from b3.train.metrics import peak_flops

    batches = json.loads((folder / f"{size}.json").read_text())
    prepare = ARMS[arm](folder / "model", options)
    warm = 4 if options.device == "cpu" else 48  # more than one chunk on a GPU, so that every kernel is compiled
    for queries, targets in batches:  # pages in weights and kernels
        prepare((queries[:warm], targets[:warm]))()
    FLOPS.clear()
    seconds, losses, clock = 0.0, [], CLOCKS[options.clock]
    for batch in batches:
        run = prepare(batch)
        started = clock()
        losses.append(run())  # waits for the device
        seconds += clock() - started
        del run  # one batch in memory at a time
    found = {"pairs_per_second": size * len(batches) / seconds, "peak_gib": peak_gib(options.device), "losses": losses}
    if options.device == "cuda":
        import torch

        peak = peak_flops(torch.cuda.get_device_name())
        found["mfu"] = sum(FLOPS) / seconds / peak if peak else 0.0
    print(json.dumps(found))


def collect(arguments: argparse.Namespace, folder: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Results by (|B|, arm), one a round."""
    results: dict[tuple[int, str], list[dict[str, Any]]] = {}
    budget = ["--chunk-tokens", str(arguments.chunk_tokens), "--chunk-items", str(arguments.chunk_items)]
    budget += ["--kept-chunks", str(arguments.kept_chunks), "--clock", arguments.clock, "--device", arguments.device]
    images = PHOTOS if arguments.size in SHAPES else IMAGES
    for size in map(int, arguments.sizes.split(",")):
        (folder / str(size)).mkdir()
        (folder / f"{size}.json").write_text(json.dumps(make_batches(folder / str(size), size, images)))
        for _ in range(arguments.rounds):
            for arm in arguments.arms.split(","):
                command = [sys.executable, __file__, "--measure", arm, str(size), str(folder), *budget]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{arm} failed at |B| = {size}:\n{done.stderr[-3000:]}")
                found = json.loads(done.stdout.splitlines()[-1])
                results.setdefault((size, arm), []).append(found)
                print(f"|B| {size} {arm}: {found}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SIZES, *SHAPES), default="100m", help="of the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", default="64,256,1024", help="batches |B|")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="ours,st,recipe")
    parser.add_argument("--chunk-tokens", type=int, default=1024, help="a GPU: 8192")
    parser.add_argument("--kept-chunks", type=int, default=1, help="of ours: those that are embedded once")
    parser.add_argument("--chunk-items", type=int, default=8)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, one thread")
    parser.add_argument("--measure", nargs=3, metavar=("ARM", "B", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arm, size, name = arguments.measure
        measure(arm, int(size), Path(name), arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        texts = [" ".join(WORDS), QUESTION + CAPTION + WANTED + "0123456789"]
        write_model(Path(name) / "model", arguments.size, texts, arguments.device)
        results = collect(arguments, Path(name))
    print(
        f"{arguments.size}, {arguments.rounds} rounds, {dtype_on(arguments.device)}, chunks of {arguments.chunk_tokens}"
        f" tokens (recipe: {arguments.chunk_items} items), {arguments.clock} time\n"
        "| batch | arm | pairs/s | ratio of ours | peak GiB | losses |\n|---:|---|---:|---:|---:|---|"
    )
    speed = {key: statistics.median(r["pairs_per_second"] for r in rounds) for key, rounds in results.items()}
    for (size, arm), rounds in results.items():
        ratio = speed[size, "ours"] / speed[size, arm] if (size, "ours") in speed else float("nan")
        losses = ", ".join(f"{value:.3f}" for value in rounds[0]["losses"])
        peak = max(r["peak_gib"] for r in rounds)
        print(f"| {size} | {arm} | {speed[size, arm]:.2f} | {ratio:.2f} | {peak:.2f} | {losses} |")


if __name__ == "__main__":
    main()
