"""Several batches at once on a CPU: the vectors of one thread, in order, and errors that reach the caller."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from golden_data import cases, checkpoint, item

from b3 import Embedder
from b3.model.encode import Encoder

pytestmark = pytest.mark.core

ITEMS = [item(case) for case in cases()]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder.from_pretrained(checkpoint(tmp_path_factory.mktemp("golden")), dtype="float32")


def test_threads_share_batches_and_change_no_byte(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    one = Encoder(model, batch_tokens=256).encode(ITEMS)
    torch.set_num_threads(3)
    forward, seen = model.forward, []

    def noting(batch: object, **options: object) -> object:
        seen.append(torch.get_num_threads())
        return forward(batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", noting)
    assert np.array_equal(Encoder(model, batch_tokens=256).encode(ITEMS), one)
    assert len(seen) > 3 and set(seen) == {1}
    assert torch.get_num_threads() == 3


def test_an_error_in_a_forward_pass_reaches_the_caller(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)

    def failing(batch: object, **options: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        Encoder(model, batch_tokens=256).encode(ITEMS)
    assert torch.get_num_threads() == 2
