"""Evaluate a model on subsets: encode each distinct item once, score, write, and skip what is already there."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from b3 import distributed
from b3.data.datasets import EvalDataset
from b3.errors import DataError, RunError
from b3.eval.benchmark import Benchmark, of_source
from b3.eval.page import write_explanations
from b3.eval.report import read_score, summarise, write_subset, write_summary
from b3.eval.score import SubsetScore, score_subset
from b3.files import claim, write_json
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


def _claim(folder: Path, facts: dict[str, Any], names: dict[str, Any]) -> None:
    """Write the manifest, or check that the folder holds the same evaluation. Raises `RunError` naming a difference.

    `facts` decide (weights by content), `names` are only recorded.
    """
    remedy = "choose another --encode_output_path or delete it"
    scores = "_score.json"  # files of another program
    if claim(folder, facts, "evaluation", remedy, foreign=lambda name: name.endswith(scores)) is None:
        try:
            write_json(folder / MANIFEST, {**facts, "names": names})
        except OSError as error:
            raise RunError(f"output directory {folder} cannot be written ({error.strerror}); choose another") from None


def evaluate(
    spec: EvalSpec,
    subsets: list[str],
    folder: Path,
    *,
    benchmark: Benchmark | None = None,
    max_items: int | None = None,
    workers: int = 0,
    batch_tokens: int | None = None,
    explain: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate `spec` on `subsets` and write all files to `folder`; subsets scored before are not scored again.

    All ranks of a process group share the encoding; rank 0 writes. Vectors are kept below `folder`/embeddings, so an
    interrupted run continues.

    Args:
        benchmark: loads the rows and has its own leaderboard file and published scores; by default that of the source.
            Its name is one of the facts that decide whose folder it is.
        max_items, workers, batch_tokens: as in `Encoder`.
        explain: also write <subset>_errors.html with so many wrong predictions of each newly scored subset.

    Returns the summary of `b3.eval.report.summarise` with `seconds`, `items` and `items_per_second`.

    Raises `InputError`, before the model is loaded, for an unknown subset, a missing image folder, or a folder that
    holds another evaluation.
    """
    started = time.perf_counter()
    benchmark = benchmark or of_source(spec.source)
    datasets = [
        benchmark.load(spec.source, name, spec.split, image_dir=spec.image_dir, prefix_targets=spec.prefix_targets)
        for name in subsets
    ]
    facts = spec.facts()
    if distributed.rank() == 0:
        _claim(folder, facts | {"benchmark": benchmark.name}, {"model": spec.model, "adapter": spec.adapter})
    distributed.barrier()
    todo = [dataset for dataset in datasets if read_score(folder, dataset.name) is None]
    distributed.barrier()  # all ranks have looked before rank 0 writes the first score
    num_items = 0
    if todo:
        cache = EmbeddingCache(folder / "embeddings", {key: facts[key] for key in CACHE_FACTS})
        encoder = Encoder(spec.load(), batch_tokens, max_items, workers, cache, spec.on_error)
        for dataset in todo:
            encoder.skipped.clear()
            score = evaluate_subset(dataset, encoder, spec.normalize, spec.round_targets, progress)
            if distributed.rank() == 0:
                write_subset(folder, dataset, score, benchmark.task(dataset.name).metric, encoder.skipped)
                if explain:
                    write_explanations(folder, dataset, score, explain)
        num_items = encoder.num_encoded
    distributed.barrier()
    summary = _summary(folder, subsets, benchmark)
    seconds = time.perf_counter() - started
    summary |= {"seconds": round(seconds, 2), "items": num_items, "items_per_second": round(num_items / seconds, 2)}
    if distributed.rank() == 0:
        write_summary(folder, summary, spec.model, benchmark)
    return summary


def _summary(folder: Path, subsets: list[str], benchmark: Benchmark) -> dict[str, Any]:
    """Of the score files in `folder`."""
    scores = {name: score for name in subsets if (score := read_score(folder, name)) is not None}
    num_correct = {name: (score["num_correct"], score["num_data"]) for name, score in scores.items()}
    return summarise({name: score["acc"] for name, score in scores.items()}, benchmark, num_correct)
