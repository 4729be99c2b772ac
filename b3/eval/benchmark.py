"""What a benchmark is: its tasks, how their rows are loaded, and what of others is published about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from b3 import registry
from b3.data.datasets import EvalDataset, load_eval
from b3.data.tables import list_subsets

FAMILIES = ("Classification", "VQA", "Retrieval", "Visual grounding")
OTHER = "Other"


@dataclass(frozen=True, slots=True)
class Task:
    """A subset of a benchmark.

    family: heading under which means are taken. in_domain: None where that has no meaning. metric: a name of
    `b3.eval.score.METRICS`.
    """

    name: str
    family: str
    in_domain: bool | None = None
    metric: str = "precision@1"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A named list of tasks.

    Args:
        source: where the rows come from if the user names no other.
        load: (source, task, split, image_dir=, prefix_targets=) -> rows; prompts are part of the rows.
        subsets: (source, split) -> names that the source holds; [] where it cannot tell.
        published: () -> scores of known models, by model and task.
        leaderboard: (summary, metadata) -> the JSON to submit.
    """

    name: str
    tasks: tuple[Task, ...]
    source: str
    load: Callable[..., EvalDataset] = load_eval
    subsets: Callable[[str, str], list[str]] = list_subsets
    published: Callable[[], dict[str, dict[str, float]]] | None = None
    leaderboard: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def family_means(self, scores: dict[str, float]) -> dict[str, float]:
        """Plain means over tasks by family, 'IND', 'OOD' and 'overall'; only groups that `scores` covers in full.

        Subsets that are no task of this benchmark play no part.
        """
        groups: dict[str, list[str]] = {}
        for task in self.tasks:
            groups.setdefault(task.family, []).append(task.name)
        for label, is_in_domain in (("IND", True), ("OOD", False)):
            if names := [task.name for task in self.tasks if task.in_domain is is_in_domain]:
                groups[label] = names
        groups["overall"] = self.names
        return {
            group: sum(scores[name] for name in names) / len(names)
            for group, names in groups.items()
            if all(name in scores for name in names)
        }

    def expand(self, names: list[str], available: list[str]) -> list[str]:
        """Subset names from the command line, each once.

        'all' means all that the source lists, or the benchmark's if it cannot list them; a family ('vqa', 'Visual
        grounding', 'visual-grounding') means its subsets among those.
        """
        everything = available or self.names
        families = {family.lower().replace(" ", "-"): family for family in family_order()}
        result: list[str] = []
        for name in names:
            family = families.get(name.lower().replace(" ", "-"))
            if name == "all":
                result += everything
            elif family is not None and name not in everything:
                result += [subset for subset in everything if family_of(subset) == family]
            else:
                result.append(name)
        return list(dict.fromkeys(result))


def benchmarks() -> list[Benchmark]:
    """All that the registry names."""
    return [registry.load("benchmark", name) for name in registry.BENCHMARKS]


def task_of(subset: str) -> Task:
    """The task of that name in any benchmark; data of the user's own belongs to the family 'Other'."""
    for benchmark in benchmarks():
        for task in benchmark.tasks:
            if task.name == subset:
                return task
    return Task(subset, OTHER)


def family_of(subset: str) -> str:
    return task_of(subset).family


def family_order() -> list[str]:
    """Families in the order of tables: the usual four, those of other benchmarks, and last 'Other'."""
    more = [task.family for benchmark in benchmarks() for task in benchmark.tasks]
    return [*dict.fromkeys([*FAMILIES, *more]), OTHER]
