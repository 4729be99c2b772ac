"""The encoder: batches by tokens, the same bytes for any ranks and workers, resumable, no other model's vectors."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Job
from golden_data import GOLDEN, cases, checkpoint, item
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import run_python
from safetensors.numpy import load_file

import eval_mmeb
from b3 import Embedder
from b3.data.digests import joined
from b3.data.items import Item
from b3.data.lazy import Lazy
from b3.errors import DataError, RunError
from b3.model.batch import Batch, Grid, Processor, Tokens, balanced, token_batches
from b3.model.cache import EmbeddingCache
from b3.model.encode import Encoder
from b3.model.workers import workers_for

pytestmark = pytest.mark.core

ITEMS = [item(case) for case in cases()]
EXPECTED = load_file(GOLDEN / "embed_expected.safetensors")["base/raw"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Embedder:
    return Embedder.from_pretrained(folder, dtype="float32")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 400), st.none() | st.integers(1, 5))
def test_batches_cover_each_item_once_within_the_budget(lengths: list[int], budget: int, most: int | None) -> None:
    batches = token_batches(lengths, budget, most)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
        assert most is None or len(batch) <= most
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


def test_a_bound_on_media_leaves_texts_together() -> None:
    lengths, has_media = [9, 8, 3, 7, 2, 6], [True, True, False, True, False, False]
    batches = [batch.tolist() for batch in token_batches(lengths, 100, 2, has_media)]
    assert batches == [[0, 1], [3, 5, 2, 4]]


def test_a_bound_on_media_is_on_what_the_model_is_given(model: Embedder) -> None:
    sizes = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, batch: Any, *, normalize: bool) -> Any:
            sizes.append((len(batch), 0 if batch.grids is None else len(batch.grids)))
            return model(batch, normalize=normalize)

    encoder = Encoder(Noting(), max_media=1)  # type: ignore[arg-type]
    vectors = encoder.encode(ITEMS)
    assert max(images for _, images in sizes) == 1 and max(items for items, _ in sizes) > 1
    assert np.abs(vectors - EXPECTED).max() < 1e-4


def test_workers_that_suit_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert (workers_for("cpu"), workers_for("cuda")) == (0, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers_for("cuda") == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert workers_for("cuda") == 0


@pytest.mark.parametrize("workers", [0, 1, 2, None])
def test_workers_change_no_byte(model: Embedder, workers: int | None) -> None:
    one = Encoder(model, batch_tokens=512).encode(ITEMS)
    assert np.array_equal(Encoder(model, batch_tokens=512, workers=workers).encode(ITEMS), one)
    assert np.abs(one - EXPECTED).max() < 1e-4


def test_equal_images_under_other_names_are_encoded_once(model: Embedder, tmp_path: Path) -> None:
    source = GOLDEN / "images" / "photo2.png"
    (tmp_path / "copy.png").write_bytes(source.read_bytes())
    text = "<|image_1|>\nRepresent the given image.\n"
    encoder = Encoder(model)
    vectors = encoder.encode([Item(text, source), Item(text, tmp_path / "copy.png"), Item("other")])
    assert encoder.num_encoded == 2
    assert np.array_equal(vectors[0], vectors[1])


FACTS = {"model": "a", "dtype": "float32"}


def test_an_interrupted_run_continues_with_the_same_bytes(model: Embedder, tmp_path: Path) -> None:
    whole = Encoder(model, batch_tokens=256).encode(ITEMS)
    forward, calls = model.forward, []

    def stopping(batch: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(batch, **options)  # type: ignore[arg-type]

    model.forward = stopping  # type: ignore[assignment, method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            Encoder(model, batch_tokens=256, cache=EmbeddingCache(tmp_path, FACTS)).encode(ITEMS)
    finally:
        model.forward = forward  # type: ignore[method-assign]
    again = Encoder(model, batch_tokens=256, cache=EmbeddingCache(tmp_path, FACTS))
    assert np.array_equal(again.encode(ITEMS), whole)
    assert 0 < again.num_encoded < len(ITEMS)
    third = Encoder(model, batch_tokens=256, cache=EmbeddingCache(tmp_path, FACTS))
    assert np.array_equal(third.encode(ITEMS), whole)
    assert third.num_encoded == 0


def test_another_model_or_flag_meets_an_empty_cache(model: Embedder, tmp_path: Path) -> None:
    Encoder(model, cache=EmbeddingCache(tmp_path, FACTS)).encode(ITEMS[:3])
    for change in ({"model": "b"}, {"dtype": "bfloat16"}):
        other = Encoder(model, cache=EmbeddingCache(tmp_path, {**FACTS, **change}))
        other.encode(ITEMS[:3])
        assert other.num_encoded == 3


def test_digests_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    """The cache looks by the first eight bytes, and then at all of them."""
    first, second = np.zeros((1, 32), dtype=np.uint8), np.zeros((1, 32), dtype=np.uint8)
    second[0, 31] = 1
    cache, tag = EmbeddingCache(tmp_path, FACTS), bytes(16)
    cache.remember(first, tag, np.ones((1, 4), dtype=np.float32), write=True)
    cache.flush()
    for digests, is_known in ((first, True), (second, False)):
        vectors = np.zeros((1, 4), dtype=np.float32)
        own, other = cache.lookup(digests, tag, vectors)
        assert (bool(own[0]), bool(other[0]), vectors.any()) == (is_known, False, is_known)


def test_a_changed_image_is_encoded_again(model: Embedder, tmp_path: Path) -> None:
    path, text = tmp_path / "x.png", "<|image_1|>\nRepresent the given image.\n"
    Image.new("RGB", (64, 64), "red").save(path)
    red = Encoder(model, cache=EmbeddingCache(tmp_path, FACTS)).encode([Item(text, path)])
    Image.new("RGB", (64, 64), "blue").save(path)
    blue = Encoder(model, cache=EmbeddingCache(tmp_path, FACTS)).encode([Item(text, path)])
    assert np.abs(red - blue).max() > 1e-3


def test_half_written_and_damaged_shards_are_never_read(model: Embedder, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, FACTS)
    vectors = Encoder(model, cache=cache).encode(ITEMS[:4])
    shard = next(cache.folder.glob("shard-*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    (cache.folder / ".shard-x.safetensors.1.tmp").write_bytes(data)
    again = Encoder(model, cache=EmbeddingCache(tmp_path, FACTS))
    assert np.array_equal(again.encode(ITEMS[:4]), vectors)
    assert again.num_encoded == 4


def test_a_full_disk_is_one_clear_line(model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(tmp_path, FACTS)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        Encoder(model, cache=cache).encode(ITEMS[:2])
    assert not list(cache.folder.glob("*.safetensors")) and not list(cache.folder.glob(".*.tmp"))


def broken(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((90, 90), 50).save(buffer, "PNG")
    return {"empty": b"", "text": b"hello", "torn": buffer.getvalue()[:2000]}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "torn"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_fails_or_is_skipped(model: Embedder, tmp_path: Path, kind: str, workers: int) -> None:
    (tmp_path / "bad.png").write_bytes(broken(kind))
    items = [*ITEMS[:3], Item("<|image_1|>\nx", tmp_path / "bad.png"), *ITEMS[3:6]]
    with pytest.raises(DataError, match=r"bad\.png does not decode"):
        Encoder(model, workers=workers).encode(items)
    encoder = Encoder(model, workers=workers, on_error="skip")
    vectors = encoder.encode(items)
    assert np.isnan(vectors[3]).all() and not np.isnan(np.delete(vectors, 3, axis=0)).any()
    assert len(encoder.skipped) == 1 and "bad.png" in next(iter(encoder.skipped.values()))


def test_ranks_change_no_byte(model: Embedder, folder: Path, tmp_path: Path) -> None:
    one = Encoder(model, batch_tokens=256).encode(ITEMS)
    for ranks in (2, 3):
        job = Job(tmp_path, str(folder), str(tmp_path / f"v{ranks}"), ranks=ranks, program="rank_programs:encode")
        assert job.wait(300) == [0] * ranks, job.text()
        assert all(np.array_equal(np.load(tmp_path / f"v{ranks}-{rank}.npy"), one) for rank in range(ranks))


def test_evaluation_over_ranks_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    """Two ranks with a worker each, from a shell, against one process."""
    data = GOLDEN / "mmeb-eval"
    command: list[str] = [
        "--model_name", str(folder), "--normalize", "True", "--dataset_name", str(data), "--subset_name", "all",
        "--image_dir", str(data / "eval_images"), "--encode_output_path",
    ]  # fmt: skip
    assert eval_mmeb.main([*command, str(tmp_path / "1")]) == 0
    run_python("eval_mmeb.py", *command, tmp_path / "2", "--dataloader_num_workers", "1", ranks=2)
    files = sorted(p.name for p in (tmp_path / "1").glob("*_*.*"))
    assert len(files) == 12
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (json.loads((tmp_path / r / "summary.json").read_text()) for r in "12")
    assert one["subsets"] == two["subsets"] and one["items"] == two["items"]


def test_memory_holds_the_vectors_of_one_list(tmp_path: Path) -> None:
    """Two ranks encode five lists in turn; after each, both know all vectors, and hold none of them."""
    rows, dim = 1000, 1024
    size = rows * dim * 4
    ranks = [EmbeddingCache(tmp_path, FACTS) for _ in range(2)]
    held, lists = [], []
    tracemalloc.start()
    try:
        for number in range(5):
            digests = joined((hashlib.sha256(f"{number} {row}".encode()).digest() for row in range(rows)), 32)
            tag, vectors = (
                bytes(digests[0, :16]),
                np.random.default_rng(number).normal(size=(rows, dim)).astype(np.float32),
            )
            before = tracemalloc.get_traced_memory()[0] - vectors.nbytes
            for cache in ranks:
                cache.lookup(digests, tag, np.empty_like(vectors))
            for rank, cache in enumerate(ranks):  # each encodes half, and is given the other's
                for half, part in enumerate((slice(0, rows // 2), slice(rows // 2, rows))):
                    cache.remember(digests[part], tag, vectors[part].copy(), write=half == rank)
                cache.flush()
            peak = tracemalloc.get_traced_memory()[0] - before
            for cache in ranks:
                cache.settle()
            lists.append((digests, tag, hashlib.sha256(vectors).digest()))
            del vectors
            held.append(tracemalloc.get_traced_memory()[0])
            assert peak > 1.9 * size, "what is to be let go was not there"
        assert held[-1] - held[0] < size / 2  # four lists of two ranks would be eight times `size`
    finally:
        tracemalloc.stop()
    for digests, tag, digest in lists:
        for cache in ranks:
            found = np.empty((rows, dim), dtype=np.float32)
            of_this_list, _ = cache.lookup(digests, tag, found)
            assert of_this_list.all() and hashlib.sha256(found).digest() == digest


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_tokens_not_batches(ranks: int) -> None:
    """A few videos of thousands of tokens among many texts: no rank has much more than its share, none is left out."""
    rng = np.random.default_rng(ranks)
    lengths = np.concatenate([rng.integers(2000, 6000, size=37), rng.integers(5, 40, size=2000)])
    batches = token_batches(lengths, 2048)
    costs = [int(lengths[rows].sum()) for rows in batches]
    parts = balanced(costs, ranks)
    assert sorted(position for part in parts for position in part) == list(range(len(batches)))
    sums = [sum(costs[position] for position in part) for part in parts]
    assert max(sums) - min(sums) <= max(costs)
    assert max(sums) < 1.1 * sum(costs) / ranks


class Letters(Processor):
    """Texts to tokens, one per letter."""

    def check(self, item: Item) -> None: ...

    def save_pretrained(self, folder: str | Path) -> None: ...

    def tokens(self, item: Item, grids: Sequence[Grid]) -> Tokens:
        return Tokens.of_text(np.frombuffer((item.text or "").encode(), dtype=np.uint8).astype(np.int64))


class Sums:
    """A model of no weight: a vector has the sum of the tokens in it."""

    processor, dim, device, training = Letters(), 4, torch.device("cpu"), False

    def __call__(self, batch: Batch, /, *, normalize: bool) -> torch.Tensor:
        sums = torch.segment_reduce(batch.input_ids.float(), "sum", lengths=torch.tensor(batch.lengths))
        return sums[:, None].repeat(1, self.dim)

    def train(self, mode: bool = True) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("copies", [1, 3])
def test_a_row_costs_bytes_beside_its_vector(tmp_path: Path, copies: int) -> None:
    """Peaks of what Python allocates, cache included, for few and for four times as many rows."""

    def text(row: int) -> str:
        return f"row {row // copies}"

    def peak(rows: int) -> int:
        cache = EmbeddingCache(tmp_path / str(rows), FACTS)
        tracemalloc.start()
        try:
            vectors = Encoder(Sums(), cache=cache).encode(Lazy(lambda row: Item(text(row)), range(rows)))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert vectors[:, 0].tolist() == [sum(text(row).encode()) for row in range(rows)]
        return most

    peak(100)
    few, many = 4_000, 16_000
    assert (peak(many) - peak(few)) / (many - few) < 350  # with objects per row it was 1,900
