"""Mistakes of other libraries that change numbers without a word, one test each that ours does not have them."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from golden_data import checkpoint, collator, embedder
from reference_loss import as_inputs
from tiny import gradients, in_one_graph, relative
from torch.nn.functional import cross_entropy

from b3 import Embedder
from b3.config import load_config
from b3.data.items import Item
from b3.eval.ranking_metrics import query_metrics
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE
from b3.train.losses.loss import Facts
from b3.train.losses.masks import Masks
from b3.train.objective import whole_batch
from b3.train.step import CachedStep

pytestmark = pytest.mark.core

ROWS = [(0, i) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def test_every_chunk_gives_its_gradient(folder: Path) -> None:
    """MegaBatchMarginLoss dropped the gradient of every mini-batch but the last.

    https://github.com/huggingface/sentence-transformers/pull/3862
    """
    model = embedder(folder, "lora").double()
    whole = collator(model, 10**6, share=False)(ROWS)
    parts = collator(model, 1, share=False)(ROWS)
    assert (whole.num_chunks, parts.num_chunks) == (1, 16)
    CachedStep(model, InfoNCE())(whole, 0)
    expected = gradients(model)
    CachedStep(model, InfoNCE())(parts, 0)
    assert all(relative(value, expected[name]) < 1e-9 for name, value in gradients(model).items())
    with mock.patch("torch.autograd.backward", wraps=torch.autograd.backward) as backward:
        CachedStep(model, InfoNCE())(parts, 0)
    assert sum(call.args[0].ndim == 2 for call in backward.call_args_list) == 16


@pytest.mark.parametrize("kept", [1, 3])
def test_the_second_pass_drops_what_the_first_one_dropped(folder: Path, kept: int) -> None:
    """Cached losses replayed the random state of a device that they had not looked at.

    https://github.com/huggingface/sentence-transformers/pull/3862
    """
    model = embedder(folder, "lora", dropout=0.5).double()
    inputs = collator(model, 40, share=False)(ROWS)
    step = CachedStep(model, InfoNCE(), seed=5, kept_chunks=kept)
    assert inputs.num_chunks > kept + 1
    torch.manual_seed(123)  # whatever the state was before
    loss = step(inputs, 0).loss
    cached = gradients(model)
    assert in_one_graph(step, inputs) == pytest.approx(loss, rel=1e-12)
    assert all(relative(cached[name], value) < 1e-9 for name, value in gradients(model).items())


def test_instructions_are_pooled_alike_in_any_chunk(tmp_path: Path) -> None:
    """Pooling without the prompt's tokens went wrong under a cached loss, whose passes shared changed inputs.

    https://github.com/huggingface/sentence-transformers/pull/3862
    """

    class Asked:
        name = "asked"

        def query(self, row: int) -> Item:
            return Item(f"a red disc {row}", instruction="what is the given image?" if row % 2 else "what is a number?")

        def target(self, row: int) -> Item:
            return Item(f"a blue square number {row}")

    model = Embedder.from_pretrained(tiny.write_model(tmp_path / "m"), dtype="float32", prompt="qwen3_vl_embedding")
    model.backbone.requires_grad_(True)
    model = model.double()
    found = []
    for chunk_tokens in (1, 60, 10**6):
        inputs = StepCollator([Asked()], model.processor, chunk_tokens)(ROWS)  # type: ignore[list-item]
        for _ in range(2):  # a step leaves its inputs as they were
            loss = CachedStep(model, InfoNCE())(inputs, 0).loss
            found.append((loss, gradients(model)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        assert all(relative(value, found[0][1][name]) < 1e-9 for name, value in gradient.items() if value.norm() > 1e-9)


def test_a_query_meets_its_own_positive_behind_other_ranks_negatives() -> None:
    """Gathered targets lie as PNN PNN by rank, and labels took them for PP NNNN: queries learned hard negatives.

    https://github.com/huggingface/sentence-transformers/pull/3453
    """
    b, h, ranks = 2, 2, 2
    units = torch.eye(b * ranks * (1 + h), dtype=torch.float64)
    targets = units.view(ranks, b * (1 + h), -1)  # every column a direction of its own
    queries = targets[:, :: 1 + h]
    ids = torch.arange(b * ranks * (1 + h))
    facts = {"query_ids": ids[: b * ranks], "target_ids": ids, "valid": torch.ones(len(ids), dtype=torch.bool)}
    for rank in range(ranks):
        inputs = [as_inputs(facts, r, ranks) for r in range(ranks)]
        tables = [[getattr(i, name) for i in inputs] for name in ("query_ids", "target_ids", "valid")]
        tables += [list(queries), list(targets)]

        def gather(tensor: torch.Tensor, rank: int = rank, tables: list[list[torch.Tensor]] = tables) -> torch.Tensor:
            return torch.cat(next(t for t in tables if t[rank].shape == tensor.shape and torch.equal(t[rank], tensor)))

        with (
            mock.patch.multiple(
                "b3.train.objective", gather=gather, rank=lambda rank=rank: rank, world_size=lambda: ranks
            ),
            mock.patch("torch.distributed.all_reduce"),
        ):
            means, _, _ = whole_batch(InfoNCE(0.05), queries[rank], targets[rank], inputs[rank])
        share = means * ranks  # of this rank alone: nothing was summed
        assert share[1].item() == share[2].item() == 1.0, "precision and the cosine of the positives"
        assert share[0].item() < 1e-6


@pytest.mark.parametrize("chunk_tokens", [1, 10**6])
@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_the_temperature_counts_in_a_cached_step(folder: Path, chunk_tokens: int, tau: float) -> None:
    """GradCache's own loss has no temperature: https://github.com/luyug/GradCache/blob/main/src/grad_cache/loss.py."""
    model = embedder(folder, "lora")
    inputs = collator(model, chunk_tokens)(ROWS)
    found = CachedStep(model, InfoNCE(tau, mask_duplicates=False))(inputs, 0).loss
    model.eval()
    queries, targets = (model.encode([getattr(data, side)(i) for _, i in ROWS]) for data, side in
                        ((collator(model, 1).datasets[0], side) for side in ("query", "target")))  # fmt: skip
    expected = cross_entropy(torch.from_numpy(queries @ targets.T) / tau, torch.arange(8))
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_a_recipes_temperature_is_that_of_the_step(tmp_path: Path) -> None:
    """Tevatron's `--temperature` is left out as soon as `--grad_cache` is given.

    https://github.com/texttron/tevatron/blob/main/src/tevatron/retriever/gc_trainer.py
    """
    from b3.train.build import build_trainer, load_plans
    from b3.train.sampler import build_sampler
    from b3.train.stop import StopRequest

    tiny.write_data(tmp_path / "data", rows=24)
    tiny.write_model(tmp_path / "model")
    tiny.write_recipe(tmp_path)
    for tau in (0.02, 0.7):
        for kept in (1, 100):  # chunks that are embedded twice, or all of them once
            config = load_config(
                tmp_path / "recipe.yaml",
                [f"train.temperature={tau}", "train.chunk_tokens=20", f"train.kept_chunks={kept}"],
            )
            from b3.data.datasets import load_datasets

            datasets = load_datasets(config)
            sampler = build_sampler(config, datasets, load_plans(config, datasets))
            trainer = build_trainer(config, datasets, [], sampler, StopRequest())
            assert trainer.cached_step.loss.temperature == tau


def test_a_grade_stays_with_its_label() -> None:
    """VLM2Vec turns labels into a set before it pairs them with grades, which keep the old order.

    https://github.com/TIGER-AI-Lab/VLM2Vec/blob/main/src/eval_utils/metrics.py
    """
    labels, grades = [9, 1, 5], [3.0, 2.0, 1.0]  # a set of them iterates as 1, 5, 9 or so
    best = query_metrics([9, 1, 5], labels, grades)
    assert best["ndcg_linear@5"] == best["ndcg_exponential@5"] == 1.0
    for order in ([1, 9, 5], [5, 1, 9]):
        assert query_metrics(order, labels, grades)["ndcg_linear@5"] < 1.0
    gains = np.array([2, 3, 1]) / np.log2([2, 3, 4])
    ideal = np.array([3, 2, 1]) / np.log2([2, 3, 4])
    assert query_metrics([1, 9, 5], labels, grades)["ndcg_linear@5"] == pytest.approx(gains.sum() / ideal.sum())
    names = ["b", "a", "c"]
    assert query_metrics(names, names, grades)["ndcg_linear@5"] == 1.0


def test_a_mask_of_false_negatives_leaves_given_negatives_unless_asked() -> None:
    """ms-swift's INFONCE_MASK_FAKE_NEGATIVE takes hand-made hard negatives out of the loss.

    https://github.com/modelscope/ms-swift/issues/6969. Here nothing is masked by score unless `train.mask_margin` asks,
    which is equation 2 of Qwen3-Embedding and holds for hard negatives as well; by identity only what is right.
    """
    scores = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.3, 0.95, 0.5, 0.9]])  # P N P N: each row's own negative leads
    ids, queries = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11])
    facts = Facts(ids, queries, torch.ones(4, dtype=torch.bool))
    assert not Masks().excluded(scores, torch.tensor([0, 2]), facts).any()
    asked = Masks(margin=0.1).excluded(scores, torch.tensor([0, 2]), facts)
    assert asked.tolist() == [[False, True, True, False], [False, True, False, True]]


def test_a_row_with_too_few_negatives_gets_none_in_their_place(folder: Path) -> None:
    """ms-swift filled missing hard negatives up with the row's positive, which then was a negative of its query.

    https://github.com/modelscope/ms-swift/pull/10068
    """
    model = embedder(folder, "lora")
    data = collator(model, 10**6, 2)
    full = data([(0, 0), (0, 1)])
    assert full.valid.all()
    data.hard_negatives[0][0, 1] = -1  # type: ignore[index]
    try:
        short = data([(0, 0), (0, 1)])
    finally:
        data.hard_negatives[0][0, 1] = 9  # type: ignore[index]
    assert short.valid.tolist() == [True, True, False, True, True, True]
    facts = Facts(short.target_ids, short.query_ids, short.valid)
    excluded = Masks(duplicates=False).excluded(torch.zeros(2, 6), torch.tensor([0, 3]), facts)
    assert excluded.nonzero().tolist() == [[0, 2], [1, 2]]
