"""Random steps (backbones, adapters, dropout, masks, directions, lengths, a teacher, ranks): cached is plain.

`tests/hardening/random_steps.py` runs as many more as it is given time for.
"""

from __future__ import annotations

import pytest
import torch
from step_cases import Case, Models, check, draw

pytestmark = pytest.mark.core

NUMBERS = range(40)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_cached_step_is_a_plain_one(models: Models, number: int) -> None:
    case = draw(number)
    check(case, models)


def test_the_cases_cover_what_they_say() -> None:
    cases: list[Case] = [draw(number) for number in NUMBERS]
    for what in (
        lambda c: c.kind == "qwen3_vl" and c.trained != "full", lambda c: c.ranks == 3, lambda c: c.dropout > 0,
        lambda c: c.lengths, lambda c: "distill_weight" in c.options, lambda c: c.collator["num_known"],
        lambda c: c.options.get("symmetric"), lambda c: c.options.get("directions"), lambda c: c.hard is not None,
        lambda c: c.options["mask_teacher_margin"] is not None, lambda c: c.dtype == torch.float32,
        lambda c: c.collator["closed"], lambda c: c.collator["temperatures"], lambda c: c.trained == "full",
    ):  # fmt: skip
        assert sum(bool(what(case)) for case in cases) >= 3


def test_a_wrong_gradient_is_seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a step that forgets one chunk's gradient, and one whose dropout differs between passes."""
    from b3.train import step

    number = next(n for n in range(200) if (c := draw(n)).dropout and c.ranks == 1 and c.trained != "full"
                  and c.collator["chunk_tokens"] == 1 and c.dtype == torch.float64 and len(c.rows) > 2)  # fmt: skip
    check(draw(number), models)
    calls: list[int] = []
    seed = step.chunk_seed
    monkeypatch.setattr(step, "chunk_seed", lambda *a: seed(*a) + len(calls.append(1) or calls))  # type: ignore
    with pytest.raises(AssertionError):
        check(draw(number), models)
