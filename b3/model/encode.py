"""Items to vectors: each distinct item once, sorted by length, in batches of a token budget, over ranks and workers.

1. Every item is measured without decoding: a digest of its content, and how many tokens it takes. 2. Distinct items are
cut into batches of similar length; the cut depends on nothing but the items, so the vectors are the same bytes for any
number of ranks and workers. 3. Ranks share the batches; worker processes decode, resize and patchify ahead of the
model. 4. With a cache, finished batches are kept on disk and an interrupted run continues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from b3 import distributed
from b3.console import bar
from b3.data.items import Item, as_item
from b3.errors import DataError
from b3.model.batch import token_batches
from b3.model.workers import run_ahead

if TYPE_CHECKING:
    from b3.model.batch import Batch, Processor
    from b3.model.cache import EmbeddingCache
    from b3.model.embedder import Embedder

# Tokens of one forward pass: enough to fill a GPU; on a CPU, more than fits its caches is slower.
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}


def unique_items(items: Iterable[Item]) -> tuple[list[Item], np.ndarray]:
    """(distinct items in first-seen order, (N,) int64 index of each input into them), by text and image name."""
    seen: dict[tuple[str, str], int] = {}
    distinct: list[Item] = []
    index = []
    for item in items:
        key = item.key
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(item)
        index.append(seen[key])
    return distinct, np.asarray(index, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of an item before it is decoded: a digest of its content, its tokens, or why it cannot be used."""

    digest: bytes
    num_tokens: int
    problem: str | None = None


def measure(processor: Processor, item: Item) -> Measured:
    """Measure one item; a problem is noted, not raised."""
    try:
        return Measured(*processor.measure(item))
    except DataError as error:
        return Measured(hashlib.sha256("\0".join(item.key).encode()).digest(), 0, str(error))


@dataclass
class Encoder:
    """Encodes lists of items with one model.

    Args:
        embedder: the model; put into eval mode while encoding.
        batch_tokens: upper bound on the tokens of one forward pass; None: what suits the device.
        max_items: upper bound on the items of one forward pass.
        workers: processes that decode and tokenise ahead; 0: the main process does it.
        cache: vectors on disk, or None.
        on_error: "fail", or "skip": an item that cannot be read gets a vector of NaN and is listed in `skipped`.
    """

    embedder: Embedder
    batch_tokens: int | None = None
    max_items: int | None = None
    workers: int = 0
    cache: EmbeddingCache | None = None
    on_error: str = "fail"
    skipped: dict[str, str] = field(default_factory=dict)
    num_encoded: int = 0  # distinct items that went through the model, over all ranks and calls

    def __post_init__(self) -> None:
        self._prepare = _Prepare(self.embedder.processor)

    def encode(self, items: Iterable[Item], progress: str | None = None) -> np.ndarray:
        """Raw vectors (N, D) float32 in the order of `items`, on every rank.

        Raises `DataError` for the first item that cannot be used (unless on_error is "skip").
        """
        named, of_input = unique_items(items)
        measured = self._measure(named)
        first: dict[bytes, int] = {}
        distinct = [i for i, m in enumerate(measured) if first.setdefault(m.digest, i) == i]
        position = {measured[i].digest: row for row, i in enumerate(distinct)}
        vectors = np.full((len(distinct), self.embedder.dim), np.nan, dtype=np.float32)
        for i in distinct:
            self._note(named[i], measured[i].problem)
        self._run([named[i] for i in distinct], [measured[i] for i in distinct], vectors, progress)
        rows = np.asarray([position[m.digest] for m in measured], dtype=np.int64)
        return vectors[rows[of_input]]

    def _budget(self) -> int:
        if self.batch_tokens is not None:
            return self.batch_tokens
        return BATCH_TOKENS.get(self.embedder.device.type, BATCH_TOKENS["cuda"])

    def _note(self, item: Item, problem: str | None) -> None:
        if problem is None:
            return
        if self.on_error == "fail":
            raise DataError(problem)
        self.skipped[item.describe()] = problem

    def _measure(self, items: list[Item]) -> list[Measured]:
        """Each rank measures its share, in threads (reading and hashing files release the interpreter)."""
        from concurrent.futures import ThreadPoolExecutor

        ranks, rank = distributed.world_size(), distributed.rank()
        with ThreadPoolExecutor(4) as pool:
            own = list(pool.map(lambda item: measure(self.embedder.processor, item), items[rank::ranks]))
        result: list[Any] = [None] * len(items)
        for r, part in enumerate(distributed.gather_objects(own)):
            result[r::ranks] = part
        return result

    def _run(self, items: list[Item], measured: list[Measured], vectors: np.ndarray, label: str | None) -> None:
        """Fill `vectors` of distinct items: from the cache, or by this and the other ranks."""
        digests = [m.digest for m in measured]
        tag = hashlib.sha256(b"".join(digests)).digest()[:16]
        own, other = self._known(digests, tag, vectors)
        wanted = np.asarray([m.problem is None for m in measured], dtype=bool) & ~other
        rows = np.flatnonzero(wanted)
        lengths = [measured[row].num_tokens for row in rows]
        batches = [rows[batch] for batch in token_batches(lengths, self._budget(), self.max_items)]
        todo = [batch for batch in batches if not own[batch].all()]
        mine = todo[distributed.rank() :: distributed.world_size()]
        done, problems = self._encode_batches(items, digests, tag, mine, label, sum(map(len, todo)))
        for rank, (finished, failed) in enumerate(distributed.gather_objects((done, problems))):
            for batch, values in finished:
                vectors[batch] = values
                self.num_encoded += len(batch)
                if self.cache and rank != distributed.rank():
                    self.cache.remember([digests[row] for row in batch], tag, values, write=False)
            for row, problem in failed:
                vectors[row] = np.nan
                self._note(items[row], problem)

    def _known(self, digests: list[bytes], tag: bytes, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What every rank has in its cache, as `EmbeddingCache.lookup`; ranks on other machines may see other disks."""
        if self.cache is None:
            return np.zeros(len(digests), dtype=bool), np.zeros(len(digests), dtype=bool)
        parts = distributed.gather_objects(self.cache.lookup(digests, tag, vectors))
        own, other = (np.logical_and.reduce([part[side] for part in parts]) for side in (0, 1))
        return own, other

    def _encode_batches(
        self,
        items: list[Item],
        digests: list[bytes],
        tag: bytes,
        batches: list[np.ndarray],
        label: str | None,
        total: int,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[int, str]]]:
        """([(rows, vectors)], [(row, problem)]) of this rank's batches; what is finished is in the cache at the end."""
        done: list[tuple[np.ndarray, np.ndarray]] = []
        problems: list[tuple[int, str]] = []
        try:
            with bar(total, label if distributed.rank() == 0 else None, "item") as shown:
                for rows, values, failed in self._forward(items, batches):
                    done.append((rows, values))
                    problems += failed
                    if self.cache:
                        self.cache.remember([digests[row] for row in rows], tag, values, write=True)
                    if failed and self.on_error == "fail":
                        break  # the other ranks finish their share; all of them raise after the gathering
                    shown.update(min(len(rows) * distributed.world_size(), total - shown.n))
        finally:
            if self.cache:
                self.cache.flush()  # also when interrupted
        return done, problems

    def _forward(self, items: list[Item], batches: list[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray, list]]:
        """(rows, raw vectors, problems) of each batch in turn."""
        import torch

        embedder = self.embedder
        was_training = embedder.training
        embedder.eval()
        try:
            with torch.inference_mode():
                tasks = ((rows, [items[row] for row in rows]) for rows in batches)
                for rows, inputs, problems in run_ahead(self._prepare, tasks, self.workers, _describe):
                    if inputs is None:
                        yield rows, np.empty((0, embedder.dim), dtype=np.float32), problems
                        continue
                    output = embedder(inputs.to(embedder.device), normalize=False)
                    yield rows, output.cpu().numpy(), problems
        finally:
            embedder.train(was_training)


Prepared = tuple[np.ndarray, "Batch | None", list[tuple[int, str]]]


@dataclass(frozen=True)
class _Prepare:
    """Inputs of one batch; runs in workers."""

    processor: Processor

    def __call__(self, task: tuple[np.ndarray, list[Item]]) -> Prepared:
        """(rows that worked, their inputs, (row, problem) of the others) of (rows, items)."""
        from b3.model.batch import collate

        good, processed, problems = [], [], []
        for row, item in zip(task[0].tolist(), task[1], strict=True):
            try:
                processed.append(self.processor(item))
                good.append(row)
            except DataError as error:
                problems.append((row, str(error)))
        inputs = collate(processed, self.processor.image_token_id) if processed else None
        return np.asarray(good, dtype=np.int64), inputs, problems


def _describe(task: tuple[np.ndarray, list[Item]]) -> str:
    shown = ", ".join(item.describe() for item in task[1][:3])
    return f"{len(task[1])} items: {shown}" + (", ..." if len(task[1]) > 3 else "")


def encode_items(
    embedder: Embedder,
    items: Sequence[Item | dict[str, Any] | str],
    normalize: bool = True,
    batch_tokens: int | None = None,
    max_items: int | None = None,
    workers: int = 0,
    progress: str | None = None,
) -> np.ndarray:
    """Vectors (N, D) float32 of `items`, in their order; see `Encoder`. L2-normalised in float32 if asked.

    Raises:
        DataError: an item is empty, or its image is missing, does not decode or lacks its token.
    """
    encoder = Encoder(embedder, batch_tokens, max_items, workers)
    vectors = encoder.encode([as_item(item) for item in items], progress)
    return unit(vectors) if normalize else vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm, in float32; a zero row stays zero."""
    norms: Callable[..., np.ndarray] = np.linalg.norm
    return vectors / np.maximum(norms(vectors, axis=1, keepdims=True), 1e-12)
