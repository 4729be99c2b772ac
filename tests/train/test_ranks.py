"""Two and three ranks give the loss and the gradients of one: of the loss alone in float64, and of whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forks import CONTEXT
from golden_data import checkpoint, collator, embedder
from reference_loss import as_inputs, more_facts, random_batch

from b3.train.losses.info_nce import InfoNCE
from b3.train.losses.loss import Loss
from b3.train.losses.matryoshka import Matryoshka
from b3.train.objective import whole_batch
from b3.train.step import CachedStep

pytestmark = pytest.mark.core

LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"symmetric": True, "mask_margin": 0.1},
    "learned": {"learn_temperature": True},
    "teacher": {"mask_teacher_margin": 0.05, "mask_duplicates": False, "symmetric": True, "learn_temperature": True},
    "distilled": {"symmetric": True, "distill_weight": 0.4, "distill_temperature": 0.1, "mask_margin": 0.1},
    "directions": {"directions": ["qt", "qq", "tt", "tq"], "mask_teacher_margin": 0.05, "more": True},
    "options": {"symmetric": True, "more": True},
    "all": {"directions": ["qt", "qq", "tt", "tq"]},
    "short": {"lengths": {8: 0.5, 16: 2.0}},
    "lengths": {"symmetric": True, "mask_teacher_margin": 0.05, "lengths": {2: 0.5, 4: 2.0}},
}
# kind of adapter, hard negatives, share duplicates, vision cache, options of the loss
STEPS: dict[str, tuple[str, int, bool, int, str]] = {
    "dora, negatives, shared, kept features": ("dora", 2, True, 64, "plain"),
    "lora, not shared, no kept features": ("lora", 0, False, 0, "learned"),
    "full, symmetric": ("full", 1, True, 64, "symmetric"),
    "several lengths": ("lora", 1, True, 64, "short"),
    "all directions": ("dora", 1, True, 64, "all"),
}
ROWS = [0, 1, 2, 1, 4, 5]


def build(tau: float, name: str) -> Loss:
    options = dict(LOSSES[name])
    lengths, _ = options.pop("lengths", None), options.pop("more", None)
    loss = InfoNCE(tau, **options)
    return loss if lengths is None else Matryoshka(loss, lengths)


def of_the_loss(name: str, h: int, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    queries, targets, facts = random_batch(6, h, 3)
    if LOSSES[name].get("more"):
        facts |= more_facts(6, h, 3)
    loss = build(0.1, name).double()
    own = (slice(rank * len(part) // ranks, (rank + 1) * len(part) // ranks) for part in (queries, targets))
    q, t = (part[where] for part, where in zip((queries, targets), own, strict=True))
    means, query_grad, target_grad = whole_batch(loss, q, t, as_inputs(facts, rank, ranks), block_logits=20)
    found = {"means": means, "queries": query_grad, "targets": target_grad}
    return found | {parameter: value.grad for parameter, value in loss.named_parameters()}


def of_a_step(folder: Path, name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    kind, negatives, share, cache, options = STEPS[name]
    model = embedder(folder, "lora" if kind == "full" else kind)
    if kind == "full":
        model.backbone.requires_grad_(True)
    loss = build(0.05, options)
    rows = ROWS[rank * 6 // ranks : (rank + 1) * 6 // ranks]
    inputs = collator(model, 60, negatives, share)([(0, i) for i in rows])
    result = CachedStep(model, loss, vision_cache_mib=cache)(inputs, 0)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found["loss"] = torch.tensor([result.loss, result.precision, result.positive, result.hardest_negative])
    return found | {parameter: value.grad for parameter, value in loss.named_parameters()}


def everything(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    found = {f"{name} {h}": of_the_loss(name, h, rank, ranks) for name in LOSSES if name != "short" for h in (0, 2)}
    return found | {name: of_a_step(folder, name, rank, ranks) for name in STEPS}


def work(rank: int, folder: Path) -> None:
    """One process of three: all ranks, then the first two of them."""
    torch.set_num_threads(1)
    for ranks in (3, 2):
        if rank < ranks:
            store = f"file://{folder}/store{ranks}"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
            torch.save(everything(folder, rank, ranks), folder / f"{ranks}-{rank}.pt")
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoint(tmp_path_factory.mktemp("ranks"))
    processes = [CONTEXT.Process(target=work, args=(rank, folder)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return everything(folder, 0, 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_loss_of_one(folder: Path, alone: dict[str, Any], ranks: int) -> None:
    found = [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    for name in (f"{n} {h}" for n in LOSSES if n != "short" for h in (0, 2)):
        for rank in range(ranks):
            assert torch.allclose(found[rank][name]["means"], alone[name]["means"], rtol=1e-12), name
        for side in ("queries", "targets"):
            joined = torch.cat([part[name][side] for part in found])
            assert torch.allclose(joined, alone[name][side], rtol=1e-10, atol=1e-13), (name, side)
        if "log_scale" in alone[name]:
            total = sum(part[name]["log_scale"] for part in found)
            assert torch.allclose(total, alone[name]["log_scale"], rtol=1e-10), name


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", list(STEPS))
def test_ranks_give_the_step_of_one(folder: Path, alone: dict[str, Any], ranks: int, name: str) -> None:
    for rank in range(ranks):
        found = torch.load(folder / f"{ranks}-{rank}.pt")[name]
        assert found.keys() == alone[name].keys()
        largest = max(float(v.norm()) for k, v in alone[name].items() if k != "loss")
        for key, value in alone[name].items():
            assert float((found[key] - value).norm()) < 1e-4 * float(value.norm()) + 1e-6 * largest, key
