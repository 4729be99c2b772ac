"""The cached step: the reference's recorded step, plain gradients for any chunks, and any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, GoldenPairs, checkpoint, collator, embedder
from safetensors.torch import load_file
from tiny import gradients, relative

from b3 import Embedder
from b3.model.adapter import new_name
from b3.train.losses.info_nce import InfoNCE, info_nce
from b3.train.step import CachedStep
from b3.train.vision_cache import VisionCache

pytestmark = pytest.mark.core

PLAIN = InfoNCE(mask_duplicates=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("chunk_tokens", [64, 100000])
def test_step_equals_the_reference(folder: Path, kind: str, negatives: int, chunk_tokens: int) -> None:
    golden = load_file(GOLDEN / "train" / "gradcache_step.safetensors")
    model = embedder(folder, kind)
    inputs = collator(model, chunk_tokens, negatives)([(0, i) for i in range(8)])
    assert (inputs.num_chunks > 1) == (chunk_tokens == 64)
    result = CachedStep(model, PLAIN)(inputs, 0)
    prefix = f"{kind}/neg{negatives}"
    assert result.loss == pytest.approx(float(golden[f"{prefix}/loss"][0]), rel=1e-5)
    ours = gradients(model)
    recorded = {k.removeprefix(f"{prefix}/grad/"): v for k, v in golden.items() if k.startswith(f"{prefix}/grad/")}
    assert len(recorded) == len(ours)
    for name, value in recorded.items():
        assert relative(ours[new_name(name)].reshape(value.shape), value) < 2e-5, name


def plain(model: Embedder, rows: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """One ordinary forward and backward of everything, item by item."""
    from b3.model.batch import collate

    data = GoldenPairs()
    queries = torch.cat([model(collate([model.processor(data.query(i))])) for i in rows])
    targets = torch.cat([model(collate([model.processor(data.target(i))])) for i in rows])
    loss = info_nce(queries, targets, 0.02)
    loss.backward()
    return float(loss.detach()), gradients(model)


def test_a_step_keeps_a_learned_temperature_in_its_bounds(folder: Path) -> None:
    model, loss = embedder(folder, "lora"), InfoNCE(0.02, learn_temperature=True)
    with torch.no_grad():
        loss.log_scale.fill_(10.0)  # type: ignore[union-attr]
    CachedStep(model, loss)(collator(model, 64)([(0, i) for i in range(4)]), 0)
    assert loss.scale().item() == pytest.approx(100.0)


@pytest.mark.parametrize("chunk_tokens", [16, 50, 200])
@pytest.mark.parametrize("share", [True, False])
def test_cached_equals_plain_with_repeated_rows(folder: Path, chunk_tokens: int, share: bool) -> None:
    rows = [0, 1, 2, 2, 5, 7, 3, 0]
    model = embedder(folder, "dora")
    loss, expected = plain(model, rows)
    inputs = collator(model, chunk_tokens, share=share)([(0, i) for i in rows])
    assert inputs.num_items == (len({*rows}) * 2 if share else 16)
    result = CachedStep(model, PLAIN)(inputs, 0)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    for name, value in gradients(model).items():
        assert relative(value, expected[name]) < 1e-4, name


def test_dropout_is_the_same_in_both_passes(folder: Path) -> None:
    """With dropout on, a cached step must equal one ordinary pass over the same chunks with the same seeds."""
    model = embedder(folder, "lora", dropout=0.3)
    inputs = collator(model, 64, share=False)([(0, i) for i in range(8)])
    assert inputs.num_chunks > 2
    step = CachedStep(model, PLAIN, seed=3)
    result = step(inputs, 7)
    cached = gradients(model)
    vectors = torch.empty(inputs.num_items, model.dim)
    for position in range(inputs.num_chunks):
        alone = step._embed(inputs.chunk(position), position, 7, VisionCache(model, inputs.images, 0))
        vectors = vectors.index_copy(0, torch.from_numpy(inputs.groups[position]), alone)
    loss = info_nce(vectors[inputs.query_index], vectors[inputs.target_index], 0.02)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, value in gradients(model).items():
        assert relative(cached[name], value) < 1e-4, name
    assert step(inputs, 8).loss != pytest.approx(result.loss, rel=1e-4)  # another step, other dropout


def test_missing_hard_negatives_are_no_negatives(folder: Path) -> None:
    model = embedder(folder, "lora")
    data = collator(model, 100000, 2)
    data.hard_negatives[0] = np.full((8, 2), -1)  # type: ignore[index]
    with_padding = CachedStep(model, PLAIN)(data([(0, i) for i in range(8)]), 0)
    model.zero_grad()
    without = CachedStep(model, PLAIN)(collator(model, 100000)([(0, i) for i in range(8)]), 0)
    assert with_padding.loss == pytest.approx(without.loss, rel=1e-6)
