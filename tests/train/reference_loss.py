"""The loss with all its options, written query by query in loops over columns: slow, plain, float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from b3.train.inputs import StepInputs


def reference_loss(queries: Tensor, targets: Tensor, facts: dict[str, Any], tau: Tensor, **options: Any) -> Tensor:
    """Mean loss of a whole batch. `facts`: target_ids, query_ids, valid, teacher_queries, teacher_targets (lists).

    And, if there, known, closed and temperatures.
    """
    n, stride = len(queries), len(targets) // len(queries)
    forward = []
    for i in range(n):
        more = _beside(i, queries, targets, facts, tau, stride, options)
        forward.append(_row(i, i * stride, queries[i], targets, facts, tau, stride, False, options, more))
    loss = sum(forward) / n
    if options.get("symmetric"):
        positives = targets[::stride]
        back = [_row(j, j, positives[j], queries, facts, tau, stride, True, options) for j in range(n)]
        loss = (loss + sum(back) / n) / 2
    return loss


def _cosine(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float(a @ b / (a.norm() * b.norm()))


def _beside(i: int, queries: Tensor, targets: Tensor, facts: Any, tau: Tensor, stride: int, o: Any) -> list[Tensor]:
    """What the directions qq, tt and tq add to the sum of pair i: exp(cosine / tau) of what is no false negative."""
    mine, terms, closed, known = targets[i * stride], [], facts.get("closed"), facts.get("known")
    tau = facts["temperatures"][i] if "temperatures" in facts else tau
    if closed is not None and closed[i]:
        return []
    ids, asked = facts["target_ids"], facts["query_ids"]
    limit = float((queries[i] @ mine).detach()) + (o["mask_margin"] if o.get("mask_margin") is not None else 9.0)
    tq, tt = facts["teacher_queries"], facts["teacher_targets"]
    most = 9.0
    if o.get("mask_teacher_margin") is not None:
        most = _cosine(tq[i], tt[i * stride]) - o["mask_teacher_margin"]

    def add(a: Tensor, b: Tensor, teacher: float) -> None:
        if float((a @ b).detach()) <= limit and teacher <= most:
            terms.append((a @ b / tau).exp())

    def right(query: int, target: int) -> bool:
        return known is not None and int(ids[target]) in known[query].tolist()

    directions, masked = o.get("directions", ["qt"]), o.get("mask_duplicates")
    for j in range(len(queries)):
        c = j * stride
        is_equal = bool(asked[i] == asked[j] or ids[i * stride] == ids[c])
        if "qq" in directions and j != i and not (masked and (is_equal or right(i, c) or right(j, i * stride))):
            add(queries[i], queries[j], _cosine(tq[i], tq[j]))
        if "tq" in directions and j == i:
            terms.append((mine @ queries[i] / tau).exp())
        elif "tq" in directions and not (masked and (is_equal or right(j, i * stride))):
            add(mine, queries[j], _cosine(tt[i * stride], tq[j]))
        for k in range(c, c + stride):
            is_right = ids[k] == ids[i * stride] or (k == c and asked[i] == asked[j]) or right(i, k)
            if "tt" in directions and j != i and facts["valid"][k] and not (masked and is_right):
                add(mine, targets[k], _cosine(tt[i * stride], tt[k]))
    return terms


def _row(
    row: int, own: int, anchor: Tensor, columns: Tensor, facts: Any, tau: Tensor, stride: int, back: bool, o: Any,
    more: Any = (),
) -> Tensor:  # fmt: skip
    tau = facts["temperatures"][row] if "temperatures" in facts else tau
    terms, kept = [(anchor @ columns[own] / tau).exp(), *more], [own]
    for c in range(len(columns)):
        if c == own:
            continue
        other_row, target = (c, c * stride) if back else (c // stride, c)
        own_target = row * stride
        is_positive = back or c % stride == 0
        score = anchor @ columns[c]
        seen, own_seen = float(score.detach()), float((anchor @ columns[own]).detach())
        if not back and not facts["valid"][c]:
            continue
        if "closed" in facts and facts["closed"][row] and other_row != row:
            continue
        if o.get("mask_duplicates"):
            asked, found = (other_row, own_target) if back else (row, target)
            if "known" in facts and facts["target_ids"][found] in facts["known"][asked]:
                continue
            if facts["target_ids"][own_target] == facts["target_ids"][target]:
                continue
            if is_positive and facts["query_ids"][row] == facts["query_ids"][other_row]:
                continue
        if o.get("mask_margin") is not None and seen > own_seen + o["mask_margin"]:
            continue
        if o.get("mask_teacher_margin") is not None:
            q, t = facts["teacher_queries"], facts["teacher_targets"]
            other = _cosine(q[other_row], t[own_target]) if back else _cosine(q[row], t[target])
            if other > _cosine(q[row], t[own_target]) - o["mask_teacher_margin"]:
                continue
        terms.append((score / tau).exp())
        kept.append(c)
    loss = -torch.log(terms[0] / sum(terms))
    if not o.get("distill_weight"):
        return loss
    q, t, teacher, student = facts["teacher_queries"], facts["teacher_targets"], [], []
    for c in kept:
        pair = (q[c], t[row * stride]) if back else (q[row], t[c])
        teacher.append(math.exp(_cosine(*pair) / o["distill_temperature"]))
        student.append((anchor @ columns[c] / o["distill_temperature"]).exp())
    teacher, student = [v / sum(teacher) for v in teacher], [v / sum(student) for v in student]
    forward = sum(a * torch.log(a / b) for a, b in zip(teacher, student, strict=True))
    reverse = sum(b * torch.log(b / a) for a, b in zip(teacher, student, strict=True))
    return (1 - o["distill_weight"]) * loss + o["distill_weight"] * (forward + reverse) / 2


def random_batch(n: int, h: int, seed: int, dim: int = 5) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Unit vectors (n, dim), (n (1 + h), dim) in float64 and facts with a few equal ids and some padding."""
    g = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64), dim=1)

    queries, targets = unit(n), unit(n * (1 + h))
    valid = torch.rand(n * (1 + h), generator=g) > 0.2
    valid[:: 1 + h] = True
    facts = {
        "query_ids": torch.randint(0, 2 * n, (n,), generator=g),
        "target_ids": torch.randint(0, 2 * n, (n * (1 + h),), generator=g),
        "valid": valid,
        "teacher_queries": torch.randn(n, 4, generator=g).half(),
        "teacher_targets": torch.randn(n * (1 + h), 4, generator=g).half(),
    }
    return queries, targets, facts


def more_facts(n: int, h: int, seed: int) -> dict[str, Any]:
    """Further right targets of each query, closed rows and a temperature of each row."""
    g = torch.Generator().manual_seed(seed)
    return {
        "known": torch.randint(0, 2 * n, (n, 2), generator=g),
        "closed": torch.rand(n, generator=g) < 0.3,
        "temperatures": torch.rand(n, generator=g, dtype=torch.float64) * 0.3 + 0.1,
    }


def as_inputs(facts: dict[str, Any], rank: int = 0, ranks: int = 1) -> StepInputs:
    """The part of the inputs that the loss reads, of one rank's equal share."""
    share = {k: v[rank * len(v) // ranks : (rank + 1) * len(v) // ranks] for k, v in facts.items()}
    none = torch.empty(0, dtype=torch.int64)
    empty: dict[str, Any] = {"lengths": [], "positions": None, "images_of": [], "images": None, "groups": []}
    return StepInputs(input_ids=none, is_slot=none, query_index=none, target_index=none, **empty, **share)
