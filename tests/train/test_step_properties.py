"""For random batches, chunks and options a cached step has the gradient of one plain pass over everything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from golden_data import GOLDEN
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from b3 import Embedder
from b3.data.items import Item
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.batch import collate
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE, info_nce
from b3.train.losses.loss import Facts
from b3.train.losses.masks import Masks
from b3.train.step import CachedStep, chunk_seed
from b3.train.vision_cache import VisionCache, is_vision_frozen

pytestmark = pytest.mark.core

IMAGES = [None, *(str(GOLDEN / "images" / name) for name in ("noise.png", "tiny.png", "shapes2.png"))]
WORDS = "red square number what is the shape of a blue disc".split()
Content = tuple[int, int, int]  # image, words, number: few values, so that items repeat


def item(content: Content) -> Item:
    image, words, number = content
    text = " ".join(WORDS[:words]) + f" {number}"
    return Item(f"<|image_1|>\n{text}" if image else text, IMAGES[image])


@dataclass
class Pairs:
    """Pairs by content; row r's target is also what hard negative r stands for."""

    contents: list[tuple[Content, Content]]

    def query(self, row: int) -> Item:
        return item(self.contents[row][0])

    def target(self, row: int) -> Item:
        return item(self.contents[row][1])


CONTENT = st.tuples(st.sampled_from([0, 0, 1, 2, 3]), st.integers(1, 10), st.integers(0, 1))
BATCH = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@cache
def model_of(folder: Path, kind: str, dropout: float) -> Embedder:
    model = Embedder.from_pretrained(folder, dtype="float32")
    if kind in ("lora", "dora"):
        torch.manual_seed(0)
        targets = r".*(q_proj|v_proj|down_proj|qkv)" if kind == "dora" else ("q_proj", "down_proj")
        model.backbone = attach_adapter(
            model.backbone, AdapterSpec(4, 8, dropout, kind == "dora", target_modules=targets)
        )
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        model.backbone.requires_grad_(True)
    return model.double().train()  # so that rounding hides nothing


def whole_pass(model: Embedder, inputs: Any, collator: StepCollator, rows: list, seed: int, options: Any) -> float:
    """One graph over all chunks, each by the plain forward pass of processed items under the chunk's random state."""
    items = [d.query(r) for d, r in ((collator.datasets[0], r) for _, r in rows)]
    for _, r in rows:
        negatives = [] if collator.hard_negatives is None else collator.hard_negatives[0][r]
        items += [collator.datasets[0].target(int(x) if x >= 0 else r) for x in (r, *negatives)]
    where = torch.cat([inputs.query_index, inputs.target_index]).tolist()
    of_distinct = dict(zip(where, items, strict=True))
    vectors = torch.empty(inputs.num_items, model.dim, dtype=torch.float64)
    for position, group in enumerate(inputs.groups):
        batch = collate([model.processor(of_distinct[int(i)]) for i in group])
        torch.manual_seed(chunk_seed(seed, 3, position))
        features = None  # a trained tower drops out once per image, not once per item: take its features as they come
        if not is_vision_frozen(model):
            features = VisionCache(model, inputs.images, 0).features(inputs.chunk(position))
        vectors = vectors.index_copy(0, torch.from_numpy(group.copy()), model(batch, features=features))
    stride = len(inputs.target_index) // len(inputs.query_index)
    positives = torch.arange(len(rows)) * stride
    scores = vectors[inputs.query_index].detach() @ vectors[inputs.target_index].detach().T
    facts = Facts(inputs.target_ids, inputs.query_ids, inputs.valid)
    excluded = Masks(options["mask_duplicates"]).excluded(scores, positives, facts)
    loss = info_nce(vectors[inputs.query_index], vectors[inputs.target_index], 0.1, excluded=excluded)
    loss.backward()
    return float(loss.detach())


def gradients(model: Embedder) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    batch=BATCH,
    kind=st.sampled_from(["lora", "dora", "full"]),
    dropout=st.sampled_from([0.0, 0.3]),
    h=st.integers(0, 2),
    chunk_tokens=st.sampled_from([1, 12, 40, 10**6]),
    share=st.booleans(),
    mib=st.sampled_from([0, 16]),
    kept=st.integers(1, 3),
    mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cached_equals_plain(
    folder: Path, batch: Any, kind: str, dropout: float, h: int, chunk_tokens: int, share: bool, mib: int, kept: int,
    mask: bool, seed: int,
) -> None:  # fmt: skip
    model = model_of(folder, kind, 0.0 if kind == "full" else dropout)
    rows = [(0, r) for r in range(len(batch))]
    hard = [np.random.default_rng(seed).integers(-1, len(batch), (len(batch), h))] if h else None
    collator = StepCollator([Pairs(batch)], model.processor, chunk_tokens, hard, share_duplicates=share)  # type: ignore
    inputs = collator(rows)
    loss = InfoNCE(0.1, mask_duplicates=mask)
    result = CachedStep(model, loss, seed=seed, vision_cache_mib=mib, kept_chunks=kept)(inputs, 3)
    cached = gradients(model)
    expected = whole_pass(model, inputs, collator, rows, seed, {"mask_duplicates": mask})
    plain = gradients(model)
    assert result.loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for name, value in plain.items():
        difference = cached[name] - value if name in cached else value
        assert float(difference.norm()) <= 1e-6 * float(value.norm()) + 1e-9, name
