"""The loss against ten lines of numpy and against the reference's recorded values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_data import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from b3.train import info_nce
from b3.train.losses.loss import Facts, statistics
from b3.train.losses.masks import Masks


def by_hand(queries: np.ndarray, targets: np.ndarray, tau: float, excluded: np.ndarray | None = None) -> float:
    h = len(targets) // len(queries)
    losses = []
    for i, query in enumerate(queries):
        scores = targets @ query / tau
        keep = np.ones(len(targets), bool) if excluded is None else ~excluded[i]
        top = scores[keep].max()
        losses.append(top + np.log(np.exp(scores[keep] - top).sum()) - scores[i * h])
    return float(np.mean(losses))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 1000))
def test_loss_equals_numpy(rows: int, negatives: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(rows, 6))
    targets = rng.normal(size=(rows * (1 + negatives), 6))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    loss = info_nce(torch.tensor(queries), torch.tensor(targets), 0.02)
    assert loss.item() == pytest.approx(by_hand(queries, targets, 0.02), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["unit", "raw"])
@pytest.mark.parametrize("negatives", [0, 2])
def test_loss_and_gradients_equal_the_reference(kind: str, negatives: int) -> None:
    golden = load_file(GOLDEN / "train" / "contrastive.safetensors")
    queries = golden[f"input/{kind}/q"].requires_grad_(True)
    targets = golden[f"input/{kind}/t{negatives}"].requires_grad_(True)
    loss = info_nce(queries, targets, 0.02)
    loss.backward()
    prefix = f"{kind}/neg{negatives}/world1"
    assert torch.allclose(loss, golden[f"{prefix}/loss"][0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(queries.grad, golden[f"{prefix}/grad_q"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(targets.grad, golden[f"{prefix}/grad_t"], rtol=1e-4, atol=1e-5)


def test_duplicates_and_padding_leave_the_sum() -> None:
    rng = np.random.default_rng(0)
    queries, targets = rng.normal(size=(3, 4)), rng.normal(size=(6, 4))
    targets[2] = targets[0]  # the positive of row 1 equals that of row 0
    ids = torch.tensor([7, 1, 7, 2, 3, 4])
    valid = torch.tensor([True, True, True, True, True, False])
    queries_seen = torch.tensor([5, 6, 5])  # rows 0 and 2 ask the same
    excluded = Masks().excluded(torch.zeros(3, 6), torch.tensor([0, 2, 4]), Facts(ids, queries_seen, valid))
    expected = np.zeros((3, 6), bool)
    expected[0, 2] = expected[1, 0] = True
    expected[0, 4] = expected[2, 0] = True
    expected[:, 5] = True
    assert np.array_equal(excluded.numpy(), expected)
    loss = info_nce(torch.tensor(queries), torch.tensor(targets), 0.5, excluded=excluded)
    assert loss.item() == pytest.approx(by_hand(queries, targets, 0.5, expected), rel=1e-5)


def test_ragged_targets_are_a_programmers_error() -> None:
    with pytest.raises(AssertionError):
        info_nce(torch.randn(3, 2), torch.randn(7, 2))


def test_statistics_by_hand() -> None:
    queries, targets = torch.eye(3), torch.eye(3)
    targets[2] = queries[0]  # row 2's positive is row 0's direction
    assert statistics(queries @ targets.T, torch.arange(3)).tolist() == [3.0, 2.0, 1.0, 0.0]
