"""Several lengths in one loss: against cut vectors in float64, over ranks and chunks, and through a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import as_inputs, random_batch, reference_loss

import train
from b3 import Embedder
from b3.config import load_config
from b3.errors import ConfigError
from b3.train.losses.info_nce import InfoNCE
from b3.train.losses.matryoshka import Matryoshka
from b3.train.objective import whole_batch

pytestmark = pytest.mark.core

OPTIONS = st.fixed_dictionaries(
    {
        "mask_duplicates": st.booleans(),
        "mask_margin": st.sampled_from([None, 0.1]),
        "mask_teacher_margin": st.sampled_from([None, 0.3]),
        "symmetric": st.booleans(),
        "distill_weight": st.sampled_from([0.0, 0.3]),
        "distill_temperature": st.just(0.2),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 2), OPTIONS, st.integers(0, 10**6), st.sampled_from([1, 20, 10**6]),
    st.dictionaries(st.integers(1, 5), st.sampled_from([0.25, 1.0, 3.0]), min_size=1),
)  # fmt: skip
def test_it_is_the_weighted_sum_of_the_losses_of_cut_raw_vectors(
    n: int, h: int, options: dict[str, Any], seed: int, block: int, weights: dict[int, float]
) -> None:
    """The reference cuts vectors as they were before normalising: scaled, here."""
    queries, targets, facts = random_batch(n, h, seed)
    loss = Matryoshka(InfoNCE(0.1, learn_temperature=True, **options).double(), weights)
    means, query_grad, target_grad = whole_batch(loss, queries, targets, as_inputs(facts), block)
    tau = torch.tensor(0.1, dtype=torch.float64).requires_grad_()
    q, t = queries.clone().requires_grad_(), targets.clone().requires_grad_()
    expected: Any = 0
    for dim, weight in ({5: 1.0} | weights).items():
        short = [7 * side[:, :dim] for side in (q, t)]
        units = [side / side.pow(2).sum(1, keepdim=True).sqrt() for side in short]
        expected = expected + weight * reference_loss(*units, facts, tau, **options)
    expected.backward()
    assert means[0].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    # a factor of a vector changes nothing, so gradients of unit vectors agree across the vector
    for ours, leaf in ((query_grad, q), (target_grad, t)):
        theirs = leaf.grad + 0.0
        for gradient in (ours, theirs):
            gradient -= (gradient * leaf).sum(1, keepdim=True).detach() * leaf.detach()
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert loss.loss.log_scale.grad.item() == pytest.approx(-0.1 * tau.grad.item(), rel=1e-5, abs=1e-6)


def test_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, targets, facts = random_batch(6, 0, 1, dim=8)
    expected = 0.0
    for dim, weight in {8: 1.0, 4: 2.0, 2: 0.5}.items():
        theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=50.0)
        expected += weight * float(theirs.compute_loss_from_embeddings([queries[:, :dim], targets[:, :dim]], None))
    loss = Matryoshka(InfoNCE(0.02, mask_duplicates=False), {4: 2.0, 2: 0.5})
    assert whole_batch(loss, queries, targets, as_inputs(facts))[0][0].item() == pytest.approx(expected, rel=1e-9)


def test_blocks_shrink_with_the_number_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets, facts = random_batch(12, 1, 0)
    loss, seen = Matryoshka(InfoNCE(), {2: 1.0}), []
    forward = Matryoshka.forward
    monkeypatch.setattr(
        Matryoshka, "forward", lambda self, rows, *rest: seen.append(len(rows)) or forward(self, rows, *rest)
    )
    whole_batch(loss, queries, targets, as_inputs(facts), block_logits=10 * 24)
    assert seen == [5, 5, 2]


def test_a_run_at_several_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_data(tmp_path / "data")
    tiny.write_model(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    keys = {"matryoshka": {16: 0.5, 8: 1.0}, "learn_temperature": True, "temperature": 0.05, "steps": 2}
    tree = tiny.recipe(tmp_path, output_dir=str(tmp_path / "run"), train=keys)
    recipe.write_text(yaml.safe_dump(tree))
    assert train.main([str(recipe), "model.dim=32"]) == 0
    assert Embedder.from_pretrained(tmp_path / "model", adapter=tmp_path / "run").encode(["a word"]).shape == (1, 32)
    assert load_config(tmp_path / "run" / "config.yaml").train.lengths == {16: 0.5, 8: 1.0}
    for more, message in (
        (["model.dim=32", "train.matryoshka=[33]"], "train.matryoshka 33 exceeds the 32 numbers"),
        (["model.dim=4096"], "dim 4096 exceeds the"),
    ):
        assert train.main([str(recipe), f"output_dir={tmp_path / 'other'}", *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["[]", "[0]", "[8, 8]", "{8: 0}", "{8: .inf}", "{8: -1}", "[a]", "8"])
def test_lengths_that_cannot_be_meant(tmp_path: Path, value: str) -> None:
    recipe = tiny.write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"train.matryoshka"):
        load_config(recipe, [f"train.matryoshka={value}"])
