"""Random training steps, each a function of its number: a cached step over ranks against one plain graph and loops.

The plain side shares nothing with the step but the layers: items are processed one by one, each chunk's vectors stay in
one graph under the chunk's random state, and the loss is `reference_loss`. Ranks are threads that meet for each
message; each has a copy of the model, as a process would.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny
import torch
from golden_data import GOLDEN
from reference_loss import reference_loss
from torch.nn.functional import normalize

from b3 import Embedder, registry
from b3.data.items import Item
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.batch import collate
from b3.train.inputs import StepCollator, StepInputs
from b3.train.losses.info_nce import InfoNCE
from b3.train.losses.loss import Loss
from b3.train.losses.matryoshka import Matryoshka
from b3.train.step import CachedStep, chunk_seed
from b3.train.vision_cache import VisionCache, is_vision_frozen

KINDS = ("qwen2_vl", "qwen3_vl", "bert")  # the second feeds several layers with image features (DeepStack)
IMAGES = [str(GOLDEN / "images" / name) for name in ("noise.png", "tiny.png", "shapes2.png")]
WORDS = "red square number what is the shape of a blue disc".split()
TRAINED = {  # what an adapter is put on
    "language": ("q_proj", "down_proj"), "vision too": r".*(q_proj|v_proj|down_proj|qkv)", "bert": ("query", "dense"),
}  # fmt: skip


@dataclass
class Rows:
    """Pairs whose items are drawn from few, so that they repeat; a row may have several right targets."""

    queries: list[Item]
    positives_of: list[list[Item]]
    name: str = "rows"

    def __len__(self) -> int:
        return len(self.queries)

    def query(self, row: int) -> Item:
        return self.queries[row]

    def target(self, row: int) -> Item:
        return self.positives_of[row][0]

    def positives(self, row: int) -> list[Item]:
        return self.positives_of[row]


@dataclass
class Case:
    """A drawn step. seeds: of dropout. share: rows of each rank."""

    number: int
    kind: str
    trained: str
    dora: bool
    dropout: float
    dtype: torch.dtype
    ranks: int
    share: int
    rows: Rows
    options: dict[str, Any]
    lengths: dict[int, float]
    hard: np.ndarray | None
    teacher: tuple[np.ndarray, np.ndarray] | None
    collator: dict[str, Any]
    step: dict[str, Any]
    said: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if k not in ("rows", "teacher", "said", "hard")}
        return " ".join(f"{key}={value}" for key, value in shown.items())


def draw(number: int) -> Case:
    """The case of a number."""
    rng = np.random.default_rng(number)

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    kind, ranks, share = one(*KINDS), one(1, 1, 2, 3), int(rng.integers(1, 5))
    count, h = ranks * share, one(0, 0, 1, 2)

    def item(short: bool) -> Item:
        text = " ".join(WORDS[: int(rng.integers(1, 4 if short else 11))]) + f" {rng.integers(2)}"
        return Item(text) if kind == "bert" or chance(0.5) else Item(f"<|image_1|>\n{text}", one(*IMAGES))

    most = one(1, 1, 3)
    rows = Rows(
        [item(False) for _ in range(count)], [[item(True) for _ in range(rng.integers(most) + 1)] for _ in range(count)]
    )
    options: dict[str, Any] = {
        "mask_duplicates": chance(0.7), "mask_margin": one(None, None, 0.05),
        "mask_teacher_margin": one(None, None, 0.2), "learn_temperature": chance(0.3),
    }  # fmt: skip
    if chance(0.3):
        options["directions"] = ["qt", *(name for name in ("qq", "tt", "tq") if chance(0.6))]
    elif chance(0.4):
        options["symmetric"] = True
    if chance(0.4) and "directions" not in options:
        options |= {"distill_weight": one(0.3, 1.0), "distill_temperature": one(0.1, 0.5)}
    reads = options["mask_teacher_margin"] is not None or "distill_weight" in options
    teacher = tuple(rng.normal(size=(count, 4)).astype(np.float16) for _ in range(2)) if reads else None
    trained = "bert" if kind == "bert" else one("language", "vision too", "full")
    closed, temperatures = chance(0.2), chance(0.2) and not options["learn_temperature"]
    return Case(
        number, kind, trained, dora=chance(0.5), dropout=one(0.0, 0.3), dtype=one(*[torch.float64] * 3, torch.float32),
        ranks=ranks, share=share, rows=rows, options=options,
        lengths={int(rng.integers(2, 20)): one(0.5, 2.0)} if chance(0.3) else {},
        hard=rng.integers(-1, count, (count, h)) if h else None,
        teacher=teacher,  # type: ignore[arg-type]
        collator={
            "chunk_tokens": one(1, 12, 40, 10**6), "share_duplicates": chance(0.5),
            "num_known": most if most > 1 else 0, "closed": [closed] if closed else None,
            "temperatures": [0.2] if temperatures else None,
        },
        step={
            "seed": int(rng.integers(100)), "vision_cache_mib": one(0, 16), "kept_chunks": one(1, 1, 2, 3),
            "block_logits": one(1, 30, 10**6),
        },
    )  # fmt: skip


class Models:
    """Tiny backbones by kind, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, case: Case) -> Embedder:
        folder = self.folder / case.kind
        if not folder.exists():
            texts = [f"{' '.join(WORDS)} {number}" for number in range(20)] * 5
            if case.kind == "bert":
                tiny.write_text_model(folder, "bert", hidden=32)
            elif case.kind == "qwen2_vl":
                tiny.write_model(folder)
            else:
                registry.load("backbone", case.kind).tiny(folder, texts)
        budget = {} if case.kind == "bert" else {"max_pixels": 70 * 70}
        model = Embedder.from_pretrained(folder, dtype="float32", **budget)
        if case.trained == "full":
            model.backbone.requires_grad_(True)
        else:
            torch.manual_seed(0)
            spec = AdapterSpec(4, 8, case.dropout, case.dora, target_modules=TRAINED[case.trained])
            model.backbone = attach_adapter(model.backbone, spec)
            for name, parameter in model.backbone.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return model.to(case.dtype).train()


class Ranks(threading.local):
    """Threads in place of processes: `b3.distributed` as each of them sees it."""

    rank = 0


class Meeting:
    """What the threads exchange, one value of each at a time."""

    def __init__(self, size: int) -> None:
        self.size, self.here = size, Ranks()
        self.barrier, self.slots = threading.Barrier(size, timeout=120), [None] * size
        self.embedding = threading.Lock()  # the random state is one for all threads

    def exchange(self, value: Any) -> list[Any]:
        self.slots[self.here.rank] = value
        self.barrier.wait()
        parts = list(self.slots)
        self.barrier.wait()
        return parts

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.exchange(tensor)) if self.size > 1 else tensor

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self.exchange(tensor.clone())))  # type: ignore[arg-type]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the step and the loss see these ranks."""
        embed = CachedStep._embed

        def alone(step: CachedStep, *arguments: Any) -> torch.Tensor:
            with self.embedding:
                return embed(step, *arguments)

        names = {"rank": lambda: self.here.rank, "world_size": lambda: self.size}
        with (
            mock.patch.multiple("b3.train.objective", gather=self.gather, **names),
            mock.patch.multiple("b3.train.step", **names),
            mock.patch.object(torch.distributed, "all_reduce", self.all_reduce),
            mock.patch.object(CachedStep, "_embed", alone),
        ):
            yield

    def run(self, work: Any) -> list[Any]:
        """`work(rank)` by every rank at once."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.here.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [r for r in results if isinstance(r, BaseException)]
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]
        return results


def loss_of(case: Case) -> Loss:
    loss = InfoNCE(0.1, **case.options).to(case.dtype)
    return Matryoshka(loss, case.lengths) if case.lengths else loss


def gradients(model: torch.nn.Module, loss: Loss) -> dict[str, torch.Tensor]:
    of_loss = [(name.rpartition(".")[2], parameter) for name, parameter in loss.named_parameters()]
    return {name: p.grad.clone() for name, p in [*model.named_parameters(), *of_loss] if p.grad is not None}


def plain(case: Case, model: Embedder, collator: StepCollator, parts: list[StepInputs], meeting: Meeting) -> Any:
    """(loss, gradients) of one graph over all chunks of all ranks."""
    queries, targets = [], []
    for rank, inputs in enumerate(parts):
        meeting.here.rank = rank
        items = [case.rows.query(rank * case.share + i) for i in range(case.share)]
        for i in range(case.share):
            row = rank * case.share + i
            negatives = [] if case.hard is None else case.hard[row].tolist()
            items += [case.rows.target(n if n >= 0 else row) for n in (row, *negatives)]
        where = torch.cat([inputs.query_index, inputs.target_index]).tolist()
        of_distinct = dict(zip(where, items, strict=True))
        vectors = torch.empty(inputs.num_items, model.dim, dtype=case.dtype)
        for position, group in enumerate(inputs.groups):
            batch = collate([model.processor(of_distinct[int(i)]) for i in group])
            torch.manual_seed(chunk_seed(case.step["seed"], 3, position))
            features = None  # a trained tower drops out once per image, not once per item: its features as they come
            if not is_vision_frozen(model):
                features = VisionCache(model, inputs.images, 0).features(inputs.chunk(position))
            vectors = vectors.index_copy(0, torch.from_numpy(group.copy()), model(batch, features=features))
        queries.append(vectors[inputs.query_index])
        targets.append(vectors[inputs.target_index])
    meeting.here.rank = 0
    facts: dict[str, Any] = {}
    for name in ("query_ids", "target_ids", "valid", "teacher_queries", "teacher_targets", "known", "closed",
                 "temperatures"):  # fmt: skip
        values = [getattr(inputs, name) for inputs in parts]
        if values[0] is not None:
            facts[name] = torch.cat(values)
    if "teacher_queries" not in facts:
        stride = len(facts["target_ids"]) // len(facts["query_ids"])
        count = len(facts["query_ids"])
        facts |= {"teacher_queries": torch.ones(count, 2), "teacher_targets": torch.ones(count * stride, 2)}
    first = torch.float32 if case.options["learn_temperature"] else torch.float64  # as the loss has it
    log_scale = torch.tensor(math.log(1 / 0.1), dtype=first).to(case.dtype).requires_grad_(True)
    whole_q, whole_t, total = torch.cat(queries), torch.cat(targets), torch.zeros((), dtype=case.dtype)
    options = {k: v for k, v in case.options.items() if k != "learn_temperature"}
    for length, weight in ({model.dim: 1.0} | case.lengths).items():
        q, t = (normalize(side[:, :length], dim=1) if length < model.dim else side for side in (whole_q, whole_t))
        total = total + weight * reference_loss(q, t, facts, 1 / log_scale.exp(), **options)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if case.options["learn_temperature"] and log_scale.grad is not None:
        found["log_scale"] = log_scale.grad
    return float(total.detach()), found


def check(case: Case, models: Models) -> None:
    """Raise `AssertionError` unless every rank of the cached step has the plain loss and gradient."""
    model, meeting = models.of(case), Meeting(case.ranks)
    collator = StepCollator(
        [case.rows], model.processor, hard_negatives=None if case.hard is None else [case.hard],  # type: ignore
        teachers=None if case.teacher is None else [case.teacher], **case.collator,
    )  # fmt: skip
    shares = [[(0, rank * case.share + i) for i in range(case.share)] for rank in range(case.ranks)]
    parts = [collator(rows) for rows in shares]
    copies = [copy.deepcopy(model) for _ in range(case.ranks)]

    def work(rank: int) -> tuple[float, dict[str, torch.Tensor]]:
        loss = loss_of(case)
        result = CachedStep(copies[rank], loss, **case.step)(parts[rank], 3)
        return result.loss, gradients(copies[rank], loss)

    with meeting.in_place():
        cached = meeting.run(work)
        expected, found = plain(case, model, collator, parts, meeting)
    exact = case.dtype == torch.float64
    near, floor = (1e-6, 1e-9) if exact else (2e-2, 1e-4)
    largest = max((float(value.norm()) for value in found.values()), default=0.0)
    for value, ours in cached:
        assert abs(value - expected) <= (1e-8 if exact else 1e-3) * max(1.0, abs(expected)), (value, expected)
        for name, gradient in found.items():
            difference = gradient - ours[name] if name in ours else gradient
            limit = near * float(gradient.norm()) + floor * max(1.0, largest)
            assert float(difference.norm()) <= limit, (name, float(difference.norm()), limit)
        assert not [n for n in ours if n not in found and float(ours[n].norm()) > floor * max(1.0, largest)]
