"""Rows of a task of ranked lists: candidates have names, and several may be right.

A candidate is its name: one vector per name and task, and a prediction is right if it has the name of a right one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from b3.data.items import Item

Name: TypeAlias = str | int


@dataclass(frozen=True, slots=True)
class RankedQuery:
    """A query and what its line of the info file says.

    info: `cand_names` (a list of names), `label_name` (a name or a list of them), `rel_scores` (the grades of the
    labels, where there are any), and what else the task records of a query, in order.
    """

    item: Item
    info: dict[str, Any]

    @property
    def labels(self) -> list[Name]:
        """Names of the right candidates."""
        label = self.info["label_name"]
        return label if isinstance(label, list) else [label]

    @property
    def grades(self) -> list[float] | None:
        """How right each label is, or None where all are the same."""
        return self.info.get("rel_scores")


@dataclass(frozen=True, slots=True)
class RankedSet:
    """The queries and the candidates of a task.

    candidates: by name, in the order that decides between equal scores. is_local: each query ranks the names in its own
    `cand_names` (a name may occur twice), not all. pairing: "right" or "reference", see
    `b3.eval.ranking_metrics.query_metrics`. notes: what the reader should know of the rows.
    """

    name: str
    queries: list[RankedQuery]
    candidates: dict[Name, Item]
    is_local: bool
    pairing: str = "right"
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.queries)
