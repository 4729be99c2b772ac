"""Evaluate a model on subsets: encode each distinct item once, score, write, and skip what is already there."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3 import distributed
from b3.data.datasets import EvalDataset
from b3.errors import DataError, RunError
from b3.eval.benchmark import Benchmark, Task, of_source
from b3.eval.identity import identity
from b3.eval.page import write_explanations
from b3.eval.ranked import RankedSet
from b3.eval.ranked_page import write_ranked_explanations
from b3.eval.ranking import encode_set
from b3.eval.ranking_report import files_of, ranking_summary, read_ranking, write_ranking, write_ranking_summary
from b3.eval.report import read_score, summarise, write_subset, write_summary
from b3.eval.score import SubsetScore, score_subset
from b3.files import belongs_elsewhere, changes, claim, tidy, write_json
from b3.locks import alone
from b3.model.cache import EmbeddingCache
from b3.model.checkpoint import adapter_key, checkpoint_key
from b3.model.encode import Encoder, ItemError, unique_items, unit
from b3.model.settings import Settings

if TYPE_CHECKING:
    from b3.model.embedder import Embedder

MANIFEST = "manifest.json"
# What decides a vector beside the item itself; prompts and prefixes are part of the item.
CACHE_FACTS = ("model", "adapter", "dtype", "settings")


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """Everything that decides the numbers of an evaluation.

    All `settings` count, whatever the checkpoint says (the published rule), but for pooling "auto" and dim None.
    `options` are what else the benchmark's `load` takes, such as the harness of MMEB-V2.
    """

    model: str
    source: str
    adapter: str | None = None
    split: str = "test"
    image_dir: str | None = None
    prefix_targets: bool = False
    normalize: bool = True
    dtype: str = "float32"
    settings: Settings = field(default_factory=Settings)
    on_error: str = "fail"
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Embedder:
        from b3.model.embedder import Embedder

        settings = {name: value for name, value in asdict(self.settings).items() if (name, value) != ("dim", None)}
        return Embedder.from_pretrained(self.model, self.adapter, self.dtype, **settings)

    def facts(self) -> dict[str, Any]:
        """As JSON values, checkpoints by the key of their content."""
        adapter = None if self.adapter is None else adapter_key(self.adapter)
        return asdict(self) | {"model": checkpoint_key(self.model), "adapter": adapter}

    @property
    def round_targets(self) -> bool:
        """The reference's target side leaves the model in bfloat16; its query side is autocast and stays float32."""
        return self.settings.numerics == "reference" and self.dtype == "bfloat16" and self.normalize


def evaluate_subset(
    dataset: EvalDataset,
    encoder: Encoder,
    normalize: bool = True,
    round_targets: bool = False,
    progress: bool = False,
) -> SubsetScore:
    """Encode and score one subset; a collective call. Arguments as in `EvalSpec` and `score_subset`."""
    candidates = [dataset.candidates(row) for row in range(len(dataset))]
    queries = [dataset.query(row) for row in range(len(dataset))]
    items, index = unique_items(queries + [item for row in candidates for item in row])
    try:
        vectors = encoder.encode(items, dataset.name if progress else None)
    except ItemError as error:
        pairs = enumerate(zip(queries, candidates, strict=True))
        row = next(row for row, (query, others) in pairs if error.item.key in [item.key for item in (query, *others)])
        raise DataError(f"{dataset.name} row {row}: {error}, or give --on_error skip") from None
    if normalize:  # in float32, whatever the model's dtype
        vectors = unit(vectors)
    ends = np.cumsum([len(dataset), *map(len, candidates)])
    parts = [index[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return score_subset(dataset, vectors, index[: len(dataset)], parts, round_targets)


def _claim(
    folder: Path,
    facts: dict[str, Any],
    names: dict[str, Any],
    modalities: Iterable[str],
    rows: dict[str, dict[str, str]],
    scored: Container[str],
) -> None:
    """Write the manifest, or check that the folder holds the same evaluation. Raises `RunError` naming a difference.

    `facts` decide (weights by content), `names` are only recorded. `rows` are the identities of the tasks; those of
    the `scored` ones must be what they were.
    """
    remedy = "choose another --encode_output_path or delete it"

    def foreign(name: str) -> bool:
        return name.endswith("_score.json") or name in modalities  # of another program

    with alone(folder, "evaluation", remedy):  # a moment only: others may fill it too, if theirs is the same
        record = claim(folder, facts, "evaluation", remedy, foreign=foreign) or {}
        known = record.get("rows", {})
        done = {name: rows[name] for name in rows if name in known and name in scored}
        if differing := changes(known, done):
            raise belongs_elsewhere(folder, "evaluation", differing.values(), f"its data have changed; {remedy}")
        if {**known, **rows} != known:
            try:
                write_json(folder / MANIFEST, {**facts, "names": record.get("names", names), "rows": {**known, **rows}})
            except OSError as error:
                raise RunError(f"{folder} cannot be written ({error.strerror}); {remedy}") from None


class _Encoders:
    """One model, and an encoder for each of the settings under which tasks read their items."""

    def __init__(self, spec: EvalSpec, facts: dict[str, Any], folder: Path, **limits: Any) -> None:
        self.spec, self.facts, self.folder, self.limits = spec, facts, folder / "embeddings", limits
        self.model: Embedder | None = None
        self.by_settings: dict[Settings, Encoder] = {}

    def of(self, task: Task) -> Encoder:
        """The encoder for a task, ready for it; the model is loaded for the first one."""
        if self.model is None:
            self.model = self.spec.load()
        settings = self.spec.settings if task.takes_square else replace(self.spec.settings, square=None)
        if settings not in self.by_settings:
            cache = {key: self.facts[key] for key in CACHE_FACTS} | {"settings": asdict(settings)}
            cache["numerics"] = self.model.numerics
            model: Any = self.model if settings == self.spec.settings else self.model.with_settings(square=None)
            limits = self.limits | {"on_error": self.spec.on_error}
            self.by_settings[settings] = Encoder(model, cache=EmbeddingCache(self.folder, cache), **limits)
        encoder = self.by_settings[settings]
        encoder.skipped.clear()
        return encoder

    @property
    def num_encoded(self) -> int:
        return sum(encoder.num_encoded for encoder in self.by_settings.values())


def evaluate(
    spec: EvalSpec,
    subsets: list[str],
    folder: Path,
    *,
    benchmark: Benchmark | None = None,
    max_media: int | None = None,
    workers: int | None = 0,
    batch_tokens: int | None = None,
    explain: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate `spec` on `subsets` and write all files to `folder`; subsets scored before are not scored again.

    All ranks of a process group share the encoding; rank 0 ranks and writes. Vectors are kept below
    `folder`/embeddings, so an interrupted run continues, and an item that several subsets hold is encoded once.

    Args:
        benchmark: loads the rows and has its own leaderboard file and published scores; by default that of the source.
            Its name is one of the facts that decide whose folder it is.
        max_media, workers, batch_tokens: as in `Encoder`.
        explain: also write <subset>_errors.html with so many wrong predictions of each newly scored subset.

    Returns the summary of `b3.eval.report.summarise` with `seconds`, `items` and `items_per_second`.

    Raises `InputError`, before the model is loaded, for an unknown subset, a missing image folder, or a folder that
    holds another evaluation.
    """
    started = time.perf_counter()
    benchmark = benchmark or of_source(spec.source)
    given = {"image_dir": spec.image_dir, "prefix_targets": spec.prefix_targets, **spec.options}
    datasets = {name: benchmark.load(spec.source, name, spec.split, **given) for name in subsets}
    facts, rows = spec.facts() | {"benchmark": benchmark.name}, {n: identity(part) for n, part in datasets.items()}
    distributed.agree("facts and data", {**facts, "rows": rows}, "give every machine the same")
    todo = [name for name in datasets if not _is_scored(folder, benchmark.task(name), datasets[name])]
    if distributed.rank() == 0:
        names = {"model": spec.model, "adapter": spec.adapter}
        _claim(folder, facts, names, benchmark.modalities(benchmark.names), rows, set(rows) - set(todo))
        tidy(folder)
    todo = distributed.gather_objects(todo)[0]  # other machines may not see a new file yet
    notes = [note for dataset in datasets.values() if isinstance(dataset, RankedSet) for note in dataset.notes]
    is_ranked = any(isinstance(dataset, RankedSet) for dataset in datasets.values())
    encoders = _Encoders(spec, facts, folder, batch_tokens=batch_tokens, max_media=max_media, workers=workers)
    for name in todo:
        task, dataset = benchmark.task(name), datasets.pop(name)
        _score(folder, task, dataset, encoders.of(task), spec, explain, progress)
    summary = _summary(folder, subsets, benchmark, spec, is_ranked) if distributed.rank() == 0 else {}
    summary = distributed.gather_objects(summary)[0]
    seconds, num_items = time.perf_counter() - started, encoders.num_encoded
    summary |= {"seconds": round(seconds, 2), "items": num_items, "items_per_second": round(num_items / seconds, 2)}
    if distributed.rank() == 0:
        if is_ranked:
            write_ranking_summary(folder, summary | {"notes": notes}, spec.model, benchmark)
        else:
            write_summary(folder, summary, spec.model, benchmark)
    return summary


def _is_scored(folder: Path, task: Task, dataset: EvalDataset | RankedSet) -> bool:
    if isinstance(dataset, RankedSet):
        return read_ranking(folder, task) is not None
    return read_score(folder, task.name) is not None


def _score(
    folder: Path,
    task: Task,
    dataset: EvalDataset | RankedSet,
    encoder: Encoder,
    spec: EvalSpec,
    explain: int,
    progress: bool,
) -> None:
    """Encode (a collective call) and, on rank 0, score and write."""
    if isinstance(dataset, RankedSet):
        encoded = encode_set(dataset, encoder, spec.normalize, progress)
        if distributed.rank() == 0:
            ranking = write_ranking(folder, task, dataset, encoded, encoder.skipped)
            if explain:
                write_ranked_explanations(
                    files_of(folder, task)["score"].parent, dataset, ranking, task.metric, explain
                )
        return
    score = evaluate_subset(dataset, encoder, spec.normalize, spec.round_targets, progress)
    if distributed.rank() == 0:
        write_subset(folder, dataset, score, task.metric, encoder.skipped)
        if explain:
            write_explanations(folder, dataset, score, explain)


def _summary(folder: Path, subsets: list[str], benchmark: Benchmark, spec: EvalSpec, is_ranked: bool) -> dict[str, Any]:
    """Of the score files in `folder`."""
    if is_ranked:
        return ranking_summary(folder, subsets, benchmark, spec.options)
    scores = {name: score for name in subsets if (score := read_score(folder, name)) is not None}
    num_correct = {name: (score["num_correct"], score["num_data"]) for name, score in scores.items()}
    return summarise({name: score["acc"] for name, score in scores.items()}, benchmark, num_correct)
