"""What a benchmark is: its tasks, how their rows are loaded, and what of others is published about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from b3 import registry
from b3.data.datasets import EvalDataset, load_eval
from b3.data.tables import list_subsets
from b3.eval.ranked import RankedSet

OTHER = "Other"


@dataclass(frozen=True, slots=True)
class Task:
    """A subset of a benchmark.

    family: heading under which means are taken. in_domain: None where that has no meaning. metric: a name of
    `b3.eval.score.METRICS`, or of `b3.eval.ranking_metrics.METRICS` for a task of ranked lists. modality: "image",
    "video", "visdoc", or '' where a benchmark has one only. is_counted: whether means of all tasks hold it.
    takes_square: whether the setting `square` holds for its items.
    """

    name: str
    family: str
    in_domain: bool | None = None
    metric: str = "precision@1"
    modality: str = ""
    is_counted: bool = True
    takes_square: bool = True


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A named list of tasks.

    Args:
        source: where the rows come from if the user names no other.
        load: (source, task, split, image_dir=, prefix_targets=, and the spec's options) -> rows, an `EvalDataset` or a
            `RankedSet`; prompts are part of the rows.
        subsets: (source, split) -> names that the source holds; [] where it cannot tell.
        published: () -> scores of known models, by model and task.
        marks: () -> means over whole modalities that others give, see `b3.eval.ranking_report.marks_table`.
        leaderboard: (summary, metadata) -> the JSON to submit.
        renamed: other names of tasks, each with the one used here.
        has_harnesses: whether `load` takes a harness and the model's prompt rule, see
            `b3.eval.benchmarks.mmeb_v2.harness`.
    """

    name: str
    tasks: tuple[Task, ...]
    source: str
    load: Callable[..., EvalDataset | RankedSet] = load_eval
    subsets: Callable[[str, str], list[str]] = list_subsets
    published: Callable[[], dict[str, dict[str, float]]] | None = None
    marks: Callable[[], list[dict[str, str]]] | None = None
    leaderboard: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    has_harnesses: bool = False

    @property
    def names(self) -> list[str]:
        """Of the tasks that count."""
        return [task.name for task in self.tasks if task.is_counted]

    def task(self, subset: str) -> Task:
        """The task of that name; data of the user's own belongs to the family 'Other'."""
        return next((task for task in self.tasks if task.name == subset), Task(subset, OTHER))

    def families(self, subsets: Iterable[str]) -> dict[str, list[str]]:
        """Subsets by family, in the order given; families in that of the tasks, 'Other' last, none empty."""
        family_of = {subset: self.task(subset).family for subset in subsets}
        order = dict.fromkeys([*(task.family for task in self.tasks), OTHER])
        members = {family: [subset for subset in family_of if family_of[subset] == family] for family in order}
        return {family: names for family, names in members.items() if names}

    def domains(self, subsets: Iterable[str]) -> dict[str, list[str]]:
        """Subsets in domain ('IND') and out of it ('OOD'); neither where that has no meaning."""
        members: dict[str, list[str]] = {"IND": [], "OOD": []}
        for subset in subsets:
            if (in_domain := self.task(subset).in_domain) is not None:
                members["IND" if in_domain else "OOD"].append(subset)
        return {domain: names for domain, names in members.items() if names}

    def modalities(self, subsets: Iterable[str]) -> dict[str, list[str]]:
        """Counted subsets by modality, in the order of the tasks; none where the benchmark has one only."""
        known = set(subsets)
        members: dict[str, list[str]] = {}
        for task in self.tasks:
            if task.modality and task.is_counted and task.name in known:
                members.setdefault(task.modality, []).append(task.name)
        return members

    def family_means(self, scores: dict[str, float]) -> dict[str, float]:
        """Plain means over tasks by family, 'IND', 'OOD', modality and 'overall'; only groups covered in full.

        Subsets that are no task of this benchmark play no part.
        """
        groups = {
            **self.families(self.names),
            **self.domains(self.names),
            **self.modalities(self.names),
            "overall": self.names,
        }
        return {
            group: sum(scores[name] for name in names) / len(names)
            for group, names in groups.items()
            if all(name in scores for name in names)
        }

    def expand(self, names: list[str], available: list[str]) -> list[str]:
        """Subset names from the command line, each once.

        'all' means all that the source lists, or the benchmark's if it cannot list them; a family ('vqa', 'Visual
        grounding', 'visual-grounding') or a modality means its subsets among those. Tasks that do not count are meant
        by their own names alone.
        """
        everything = [name for name in available or self.names if self.task(name).is_counted]
        families = {_plain(family): subsets for family, subsets in self.families(everything).items()}
        families |= self.modalities(everything)
        known = {_plain(task.family) for task in self.tasks} | {task.modality for task in self.tasks}
        result: list[str] = []
        for name in (dict(self.renamed).get(name, name) for name in names):
            if name == "all":
                result += everything
            elif name not in everything and _plain(name) in known:
                result += families.get(_plain(name), [])
            else:
                result.append(name)
        return list(dict.fromkeys(result))


def _plain(family: str) -> str:
    return family.lower().replace(" ", "-")


def of_source(source: str | None) -> Benchmark:
    """The benchmark whose rows `source` has by its name; MMEB for None and for any other source."""
    benchmarks: list[Benchmark] = [registry.load("benchmark", name) for name in registry.BENCHMARKS]
    mmeb: Benchmark = registry.load("benchmark", "mmeb")
    return next((benchmark for benchmark in benchmarks if benchmark.source == source), mmeb)
