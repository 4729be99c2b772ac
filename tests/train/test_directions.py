"""More directions in one sum, closed options, several right targets, a temperature per family: against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import as_inputs, more_facts, random_batch, reference_loss

from b3.train.losses.info_nce import InfoNCE
from b3.train.losses.matryoshka import Matryoshka
from b3.train.objective import whole_batch

pytestmark = pytest.mark.core

DIRECTIONS = st.lists(st.sampled_from(["qq", "tt", "tq"]), unique=True).map(lambda more: ["qt", *more])
OPTIONS = st.fixed_dictionaries(
    {
        "directions": DIRECTIONS,
        "mask_duplicates": st.booleans(),
        "mask_margin": st.sampled_from([None, 0.0, 0.1]),
        "mask_teacher_margin": st.sampled_from([None, 0.3]),
        "distill_weight": st.sampled_from([0.0, 0.3]),
        "distill_temperature": st.just(0.2),
    }
)
FACTS = st.lists(st.sampled_from(["known", "closed", "temperatures"]), unique=True)


def check(loss: Any, n: int, h: int, seed: int, facts_given: list[str], block: int, options: dict[str, Any]) -> None:
    queries, targets, facts = random_batch(n, h, seed)
    facts |= {name: value for name, value in more_facts(n, h, seed).items() if name in facts_given}
    means, query_grad, target_grad = whole_batch(loss, queries, targets, as_inputs(facts), block)
    q, t = queries.clone().requires_grad_(), targets.clone().requires_grad_()
    expected = reference_loss(q, t, facts, torch.tensor(0.1, dtype=torch.float64), **options)
    expected.backward()
    assert means[0].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    assert torch.allclose(query_grad, q.grad, atol=1e-6)
    assert torch.allclose(target_grad, t.grad, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), OPTIONS, FACTS, st.integers(0, 10**6), st.sampled_from([1, 20, 10**6]))
def test_loss_and_gradients_equal_loops(
    n: int, h: int, options: dict[str, Any], facts: list[str], seed: int, block: int
) -> None:
    check(InfoNCE(0.1, **options).double(), n, h, seed, facts, block, options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.booleans(), FACTS, st.integers(0, 10**6))
def test_both_ways_equal_loops(n: int, h: int, masked: bool, facts: list[str], seed: int) -> None:
    options = {"symmetric": True, "mask_duplicates": masked}
    check(InfoNCE(0.1, **options).double(), n, h, seed, facts, 20, options)


def test_a_cut_vector_meets_all_directions() -> None:
    """Matryoshka with more directions: the sum of the losses of vectors cut by hand."""
    queries, targets, facts = random_batch(6, 1, 0)
    options: dict[str, Any] = {"directions": ["qt", "qq", "tt", "tq"], "mask_duplicates": True}
    loss = Matryoshka(InfoNCE(0.1, **options).double(), {2: 0.5, 3: 1.0})
    tau, expected = torch.tensor(0.1, dtype=torch.float64), 0.0
    for dim, weight in ((5, 1.0), (2, 0.5), (3, 1.0)):
        cut = [torch.nn.functional.normalize(side[:, :dim], dim=1) for side in (queries, targets)]
        expected += weight * float(reference_loss(*cut, facts, tau, **options))
    assert whole_batch(loss, queries, targets, as_inputs(facts))[0][0].item() == pytest.approx(expected, rel=1e-9)


NAMES = {"qt": "query_to_doc", "qq": "query_to_query", "tt": "doc_to_doc", "tq": "doc_to_query"}


@pytest.mark.parametrize("directions", [["qt", "qq"], ["qt", "tt"], ["qt", "tq"], ["qt", "qq", "tt", "tq"]])
@pytest.mark.parametrize("h", [0, 2])
def test_equals_sentence_transformers(directions: list[str], h: int) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, targets, facts = random_batch(6, h, 1)
    facts["valid"][:] = True
    names = tuple(NAMES[name] for name in directions)
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=50.0, directions=names)
    expected = theirs.compute_loss_from_embeddings([queries, *[targets[c :: 1 + h] for c in range(1 + h)]], None)
    loss = InfoNCE(0.02, mask_duplicates=False, directions=directions)
    means, _, _ = whole_batch(loss, queries, targets, as_inputs(facts))
    assert means[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_formula_of_gte() -> None:
    """Li et al. 2023, equation 2: one sum over four kinds of pairs, written as tables."""
    queries, targets, facts = random_batch(7, 0, 4)
    a, b, c, d = (
        x @ y.T / 0.1 for x, y in ((queries, targets), (queries, queries), (targets, queries), (targets, targets))
    )
    off = torch.eye(7, dtype=torch.bool)
    z = a.exp().sum(1) + c.exp().sum(1) + sum(m.exp().masked_fill(off, 0).sum(1) for m in (b, d))
    expected = (z.log() - a.diagonal()).mean()
    loss = InfoNCE(0.1, mask_duplicates=False, directions=["qt", "qq", "tt", "tq"])
    assert whole_batch(loss, queries, targets, as_inputs(facts))[0][0].item() == pytest.approx(
        float(expected), rel=1e-12
    )


def test_a_closed_row_is_a_choice_among_its_options() -> None:
    """Cross entropy over a question's own options, whatever else is in the batch and in whatever direction."""
    queries, targets, facts = random_batch(5, 3, 2)
    facts |= {"closed": torch.ones(5, dtype=torch.bool)}
    for directions in (["qt"], ["qt", "qq", "tt", "tq"]):
        loss = InfoNCE(0.1, mask_duplicates=False, directions=directions)
        options = torch.einsum("nd,nkd->nk", queries, targets.view(5, 4, -1)) / 0.1
        options[~facts["valid"].view(5, 4)] = -torch.inf
        expected = -torch.log_softmax(options, dim=1)[:, 0].mean()
        found = whole_batch(loss, queries, targets, as_inputs(facts))[0][0].item()
        assert found == pytest.approx(float(expected), rel=1e-12)
