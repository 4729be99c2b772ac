"""Seconds and peak memory of an evaluation over three modalities: ours, and the reference's loop.

    python benchmarks/eval_v2.py [--size tiny|100m] [--rounds 3] [--tasks film_ret page_word ...]
    python benchmarks/eval_v2.py --pools 250 1000 4000 [--size tiny]      peak memory against the number of candidates

The embedded tasks of emoji_v2 with the same random weights and the real vocabulary for both arms. The reference's loop,
in one process: each task by itself, queries and then candidates, one item per name, batches of 16 in the order of their
media's paths, left padding, full-vocabulary logits and all hidden states kept, then a sort of all scores per query. Its
patches come from our processor, so the difference is in batching, repeats and the forward pass alone. Ours is
`b3.eval.run.evaluate`, files and page of results included. Each measurement is a process of its own, the arms take
turns, ratios are of medians; vectors of both are compared. float32 on a CPU. Measure on an idle machine.

--pools: one task of 20 queries and so many pages of noise (112 x 140 pixels), made when they are read.
"""

from __future__ import annotations

import argparse
import io
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

BATCH = 16
QUERIES = 20


class Noise:
    """A store of pages that are made when they are read; the path is the seed."""

    location = "noise"

    def read(self, path: str) -> bytes:
        from PIL import Image

        pixels = np.random.default_rng(int(path)).integers(0, 256, (35, 28, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((112, 140)).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def pool(size: int) -> Any:
    """A benchmark of one task with so many candidates."""
    from b3.data.images import ImageRef
    from b3.data.items import Item, Still
    from b3.eval.benchmark import Benchmark, Task
    from b3.eval.ranked import RankedQuery, RankedSet

    def load(source: str, name: str, split: str, **options: Any) -> RankedSet:
        store, text = Noise(), "<|image_1|> Understand the content of the provided document image."
        pages: dict[Any, Item] = {i: Item(text, media=(Still(ImageRef(store, str(i))),)) for i in range(size)}
        asked = [Item(f"Find a document image that matches the given query: number {i}") for i in range(QUERIES)]
        queries = [RankedQuery(item, {"cand_names": [i], "label_name": [i]}) for i, item in enumerate(asked)]
        return RankedSet(name, queries, pages, is_local=False)

    task = Task("pool", "Pages", metric="ndcg_linear@5", modality="visdoc")
    return Benchmark("pool", (task,), "noise", load=load, subsets=lambda source, split: [])


def ours(model: Path, tasks: list[str], out: Path, benchmark: Any) -> dict[str, Any]:
    """Evaluate; returns {} (vectors stay in the cache)."""
    from b3.eval.run import EvalSpec, evaluate

    options = {"harness": "vlm2vec", "prompt": "plain"}
    evaluate(EvalSpec(str(model), benchmark.source, options=options), tasks, out, benchmark=benchmark)
    return {}


def reference(model: Path, tasks: list[str], out: Path, benchmark: Any) -> dict[str, Any]:
    """The loop; returns the normalised vectors of each task, queries and then candidates."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from b3.model.backbones.qwen_vl_images import QwenVLProcessor

    network = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    processor = QwenVLProcessor.from_pretrained(model)
    vectors = {}
    for name in tasks:
        dataset = benchmark.load(benchmark.source, name, "test")
        sides = [[query.item for query in dataset.queries], list(dataset.candidates.values())]
        queries, candidates = (encode(network, processor, items) for items in sides)
        place = {name: i for i, name in enumerate(dataset.candidates)}
        for query, vector in zip(dataset.queries, queries, strict=True):
            rows = [place[n] for n in query.info["cand_names"]] if dataset.is_local else slice(None)
            np.argsort(-(candidates[rows] @ vector))
        vectors[name] = np.concatenate([queries, candidates])
    return vectors


def encode(network: Any, processor: Any, items: list[Any]) -> np.ndarray:
    """(n, D) float32, in batches of `BATCH` in the order of the media's paths."""
    import torch

    keys = [item.media[0].name if item.media else "" for item in items]
    order = sorted(range(len(items)), key=lambda i: keys[i])
    rows: list[Any] = [None] * len(items)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        inputs = padded([processor(items[i]) for i in chosen], [items[i] for i in chosen])
        with torch.no_grad():
            states = network(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        pooled = torch.nn.functional.normalize(states[:, -1].float(), dim=-1).numpy()
        for i, vector in zip(chosen, pooled, strict=True):
            rows[i] = vector
    return np.stack(rows)


def padded(processed: list[Any], items: list[Any]) -> dict[str, Any]:
    """A batch as upstream's classes take it: padded on the left, positions 0..n-1 on all axes."""
    import torch

    from b3.data.items import Video
    from b3.model.backbones.qwen_vl_images import CLIP

    longest = max(one.num_tokens for one in processed)
    ids = torch.zeros(len(processed), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    media: dict[str, list[Any]] = {"": [], "_videos": []}
    for row, (one, item) in enumerate(zip(processed, items, strict=True)):
        ids[row, longest - one.num_tokens :] = torch.from_numpy(one.input_ids)
        mask[row, longest - one.num_tokens :] = 1
        for visual, medium in zip(one.visuals, item.media, strict=True):
            media["_videos" if isinstance(medium, Video) else ""].append(visual)
    positions = (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    for kind, visuals in media.items():
        if visuals:
            patches = torch.from_numpy(np.concatenate([visual.patches for visual in visuals]))
            inputs[f"pixel_values{kind}"] = CLIP.numbers(patches)
            inputs["video_grid_thw" if kind else "image_grid_thw"] = torch.tensor([v.grid for v in visuals])
    return inputs


ARMS = {"ours": ours, "reference": reference}


def measure(arm: str, folder: Path, tasks: list[str], size: int | None) -> None:
    """Run one arm in this process and print a JSON line."""
    from b3 import registry

    benchmark = registry.load("benchmark", "emoji_v2") if size is None else pool(size)
    names = tasks or benchmark.names
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        vectors = ARMS[arm](folder / "model", names, Path(out), benchmark)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        worst = None if arm == "ours" or size is not None else difference(folder / "model", benchmark, vectors)
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "largest_difference": worst}))


def difference(model: Path, benchmark: Any, vectors: dict[str, np.ndarray]) -> float:
    """The largest difference of a vector of the loop from ours."""
    from b3 import Embedder

    embedder, worst = Embedder.from_pretrained(model, dtype="float32"), 0.0
    for name, theirs in vectors.items():
        dataset = benchmark.load(benchmark.source, name, "test")
        items = [*(query.item for query in dataset.queries), *dataset.candidates.values()]
        worst = max(worst, float(np.abs(embedder.encode(items) - theirs).max()))
    return worst


def run(arm: str, folder: Path, tasks: list[str], size: int | None = None) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--folder", str(folder)]
    command += ["--tasks", *tasks] if tasks else []
    command += ["--pools", str(size)] if size is not None else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured


def compare(folder: Path, tasks: list[str], rounds: int) -> None:
    """Print both arms' medians and their ratio."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, measured in results.items():
            measured.append(run(arm, folder, tasks))
    seconds = {arm: statistics.median(one["seconds"] for one in measured) for arm, measured in results.items()}
    for arm, measured in results.items():
        spread = ", ".join(f"{one['seconds']:.1f}" for one in measured)
        peak = max(one["peak_gib"] for one in measured)
        print(f"{arm:10} {seconds[arm]:8.1f} s ({spread})   peak {peak:.2f} GiB")
    print(f"ours is {seconds['reference'] / seconds['ours']:.2f} times as fast")
    print(f"largest difference of a vector: {results['reference'][0]['largest_difference']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "100m"), default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--pools", nargs="+", type=int, default=[], metavar="N")
    parser.add_argument("--arm", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        measure(arguments.arm, arguments.folder, arguments.tasks, arguments.pools[0] if arguments.pools else None)
        return
    from benchmarks.encode import write_model

    texts = ["find a video or a document image that matches the given query number " + "0123456789"] * 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", arguments.size, texts, "cpu")
        for size in arguments.pools:
            measured = run("ours", folder, [], size)
            print(f"{size:8,} candidates: peak {measured['peak_gib']:.3f} GiB, {measured['seconds']:.1f} s")
        if not arguments.pools:
            compare(folder, arguments.tasks, arguments.rounds)


if __name__ == "__main__":
    main()
