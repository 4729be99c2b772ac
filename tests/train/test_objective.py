"""The whole batch's loss, in blocks of rows and with every option, against loops and against another library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import as_inputs, random_batch, reference_loss

from b3.train.losses.info_nce import InfoNCE
from b3.train.objective import whole_batch

pytestmark = pytest.mark.core

OPTIONS = st.fixed_dictionaries(
    {
        "mask_duplicates": st.booleans(),
        "mask_margin": st.sampled_from([None, 0.0, 0.1]),
        "mask_teacher_margin": st.sampled_from([None, 0.0, 0.3]),
        "symmetric": st.booleans(),
        "distill_weight": st.sampled_from([0.0, 0.3, 1.0]),
        "distill_temperature": st.sampled_from([0.1, 0.5]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), OPTIONS, st.integers(0, 10**6), st.sampled_from([1, 7, 20, 10**6]))
def test_loss_and_gradients_equal_loops(n: int, h: int, options: dict[str, Any], seed: int, block: int) -> None:
    queries, targets, facts = random_batch(n, h, seed)
    loss = InfoNCE(0.1, learn_temperature=True, **options).double()
    means, query_grad, target_grad = whole_batch(loss, queries, targets, as_inputs(facts), block)
    log_scale = torch.tensor(0.1, dtype=torch.float64).log().neg().requires_grad_()
    q, t = queries.clone().requires_grad_(), targets.clone().requires_grad_()
    expected = reference_loss(q, t, facts, 1 / log_scale.exp(), **options)
    expected.backward()
    assert means[0].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    assert torch.allclose(query_grad, q.grad, atol=1e-6)
    assert torch.allclose(target_grad, t.grad, atol=1e-6)
    assert loss.log_scale.grad.item() == pytest.approx(log_scale.grad.item(), rel=1e-5, abs=1e-6)


def test_blocks_give_the_plain_gradient() -> None:
    """In float64 a table in blocks of 1, 3 and all rows is one and the same to rounding."""
    queries, targets, facts = random_batch(17, 2, 0, dim=8)
    loss = InfoNCE(0.05, symmetric=True, mask_margin=0.1)
    whole = whole_batch(loss, queries, targets, as_inputs(facts))
    for rows in (1, 3):
        parts = whole_batch(loss, queries, targets, as_inputs(facts), block_logits=rows * 51)
        for one, other in zip(parts, whole, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_logits_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets, facts = random_batch(12, 1, 0)
    loss, seen = InfoNCE(), []
    forward = InfoNCE.forward
    monkeypatch.setattr(
        InfoNCE, "forward", lambda self, rows, *rest: seen.append(len(rows)) or forward(self, rows, *rest)
    )
    whole_batch(loss, queries, targets, as_inputs(facts), block_logits=5 * 24)
    assert seen == [5, 5, 2]


@pytest.mark.parametrize("h", [0, 2])
def test_equals_sentence_transformers(h: int) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, targets, facts = random_batch(6, h, 1)
    facts["valid"][:] = True
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=50.0)
    q, t = queries.clone().requires_grad_(), targets.clone().requires_grad_()
    expected = theirs.compute_loss_from_embeddings([q, *[t[c :: 1 + h] for c in range(1 + h)]], None)
    expected.backward()
    loss = InfoNCE(0.02, mask_duplicates=False)
    means, query_grad, target_grad = whole_batch(loss, queries, targets, as_inputs(facts))
    assert means[0].item() == pytest.approx(expected.item(), rel=1e-9)
    # their cosine divides by the norm again, which changes the gradient along the vector: compare across it
    for ours, leaf in ((query_grad, q), (target_grad, t)):
        across = ours - (ours * leaf).sum(1, keepdim=True) * leaf
        assert torch.allclose(across, leaf.grad, atol=1e-9)


def test_symmetric_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, targets, facts = random_batch(6, 0, 2)
    theirs = losses.MultipleNegativesSymmetricRankingLoss(torch.nn.Identity(), scale=50.0)
    compute = getattr(theirs, "compute_loss_from_embeddings", None)
    if compute is None:
        pytest.skip("this version has no loss of given vectors")
    loss = InfoNCE(0.02, mask_duplicates=False, symmetric=True)
    means, _, _ = whole_batch(loss, queries, targets, as_inputs(facts))
    assert means[0].item() == pytest.approx(float(compute([queries, targets], None)), rel=1e-9)


def test_learned_temperature_is_kept_below_100_and_saved(tmp_path) -> None:
    loss = InfoNCE(0.02, learn_temperature=True)
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    loss.before_step()
    assert loss.scale().item() == pytest.approx(100.0)
    loss.save(tmp_path)
    other = InfoNCE(0.02, learn_temperature=True)
    other.load(tmp_path)
    assert torch.equal(other.log_scale, loss.log_scale)


def test_fixed_temperature_has_no_state(tmp_path) -> None:
    from b3.errors import RunError

    InfoNCE(0.02).save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match="temperature was not learned"):
        InfoNCE(0.02, learn_temperature=True).load(tmp_path)
