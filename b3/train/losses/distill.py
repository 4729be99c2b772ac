"""Distillation inside the batch: the student's row of similarities is drawn to the teacher's.

Over the columns j that a row i keeps in InfoNCE (its positive, and all that no mask leaves out), with one temperature
tau for both, so that equal cosines cost nothing:

    t_ij = softmax over j of cos_teacher(i, j) / tau,   s_ij = softmax over j of cos_student(i, j) / tau
    J_i  = (KL(t_i || s_i) + KL(s_i || t_i)) / 2 = sum over j of (t_ij - s_ij) (log t_ij - log s_ij) / 2

The loss of a row is (1 - w) InfoNCE_i + w J_i. J is half of Jeffreys' divergence (Proc. R. Soc. A 186, 1946); softened
rows as targets are those of Hinton et al. (arXiv 1503.02531), whose factor tau squared is left out: InfoNCE's gradient
grows with 1 / tau as well.
"""

from __future__ import annotations

import torch
from torch import Tensor


def two_way_kl(scores: Tensor, teacher_scores: Tensor, temperature: float, excluded: Tensor) -> Tensor:
    """The sum of J over rows, a scalar.

    Args:
        scores: (B, T) the student's cosines.
        teacher_scores: (B, T) the teacher's, of the same dtype, without graph.
        temperature: tau.
        excluded: (B, T) bool, columns left out of both softmaxes; at least one of each row stays.
    """
    student, teacher = (
        torch.log_softmax((table / temperature).masked_fill(excluded, float("-inf")), dim=1)
        for table in (scores, teacher_scores)
    )
    ratio = (teacher - student).masked_fill(excluded, 0.0)
    return ((teacher.exp() - student.exp()) * ratio).sum() / 2
