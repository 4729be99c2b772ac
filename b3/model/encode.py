"""Items to vectors: each distinct item once, sorted by length, in batches of a token budget, over ranks and workers.

1. Every item is measured without decoding: a digest of its content, and how many tokens it takes. 2. Distinct items are
cut into batches of similar length; the cut depends on nothing but the items, so the vectors are the same bytes for any
number of ranks and workers. 3. Ranks share the batches; worker processes decode, resize and patchify ahead of the
model. 4. With a cache, finished batches are kept on disk and an interrupted run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from b3 import distributed
from b3.console import bar
from b3.data.digests import first_seen
from b3.data.items import Item, key_digests
from b3.data.lazy import Lazy
from b3.errors import DataError
from b3.model.batch import balanced, token_batches
from b3.model.workers import run_ahead, workers_for

if TYPE_CHECKING:
    import torch

    from b3.model.batch import Batch, Processor
    from b3.model.cache import EmbeddingCache

# Tokens of one forward pass: enough to fill a GPU; on a CPU, more than fits its caches is slower.
BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
# On a CPU, where threads share batches, a short list is cut into so many of at least so many tokens.
SHARED_BATCHES, SHARED_TOKENS = 16, 1024
MEASURED_AT_ONCE = 1024  # items under way in the threads that measure
UNIT_ROWS = 8192
FORWARDS_AT_ONCE = 4  # on a CPU; each holds the activations of a batch

Prepared = tuple[np.ndarray, "Batch | None", list[tuple[int, str]]]  # (rows, their inputs, (row, problem) of others)


def unique_items(items: Iterable[Item]) -> tuple[list[Item], np.ndarray]:
    """(distinct items in first-seen order, (N,) int64 index of each input into them), by text and image name."""
    seen: dict[tuple[str, ...], int] = {}
    distinct: list[Item] = []
    index = []
    for item in items:
        key = item.key
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(item)
        index.append(seen[key])
    return distinct, np.asarray(index, dtype=np.int64)


class ItemError(DataError):
    """An item that cannot be used; whoever knows its row can name it."""

    def __init__(self, problem: str, item: Item) -> None:
        super().__init__(problem)
        self.item = item


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of N items before they are decoded.

    digests: (N, 32) uint8 of their contents. num_tokens: (N,) int64. problems: why an item cannot be used, by row.
    """

    digests: np.ndarray
    num_tokens: np.ndarray
    problems: dict[int, str]


def measure(processor: Processor, items: Sequence[Item]) -> Measured:
    """Measure items in threads (reading and hashing files release the interpreter); problems are noted, not raised.

    A row costs 40 bytes; items are made block by block where `items` makes them.
    """

    def one(item: Item) -> tuple[bytes, int, str | None]:
        try:
            return *processor.measure(item), None
        except DataError as error:
            return hashlib.sha256("\0".join(item.key).encode("utf-8", "surrogatepass")).digest(), 0, str(error)

    digests = np.zeros((len(items), 32), dtype=np.uint8)  # a shorter one is followed by zeros
    num_tokens, problems = np.empty(len(items), dtype=np.int64), {}
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(items), MEASURED_AT_ONCE):
            for row, (digest, tokens, problem) in enumerate(
                pool.map(one, items[start : start + MEASURED_AT_ONCE]), start
            ):
                digests[row, : len(digest)], num_tokens[row] = np.frombuffer(digest, dtype=np.uint8), tokens
                if problem is not None:
                    problems[row] = problem
    return Measured(digests, num_tokens, problems)


def measure_over_ranks(processor: Processor, items: Sequence[Item]) -> Measured:
    """As `measure`, each rank its share."""
    num_ranks = distributed.world_size()
    part = measure(processor, items[distributed.rank() :: num_ranks])
    whole = Measured(np.empty((len(items), 32), dtype=np.uint8), np.empty(len(items), dtype=np.int64), {})
    for rank, (digests, num_tokens) in enumerate(distributed.gather_arrays((part.digests, part.num_tokens))):
        whole.digests[rank::num_ranks], whole.num_tokens[rank::num_ranks] = digests, num_tokens
    for rank, problems in enumerate(distributed.gather_objects(part.problems)):
        whole.problems.update({rank + row * num_ranks: problem for row, problem in problems.items()})
    return whole


class Embeds(Protocol):
    """What encoding asks of a model; an `Embedder` has it."""

    training: bool

    @property
    def processor(self) -> Processor: ...

    @property
    def dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, batch: Batch, /, *, normalize: bool) -> torch.Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


@dataclass
class Encoder:
    """Encodes lists of items with one model.

    Args:
        embedder: the model; put into eval mode while encoding.
        batch_tokens: upper bound on the tokens of one forward pass; None: what suits the device.
        max_items: upper bound on the items of one forward pass.
        workers: processes that decode and tokenise ahead; 0: the main process does it; None: what suits the device.
        cache: vectors on disk, or None.
        on_error: "fail", or "skip": an item that cannot be read gets a vector of NaN and is listed in `skipped`.
        max_media: upper bound on the items with images or videos of one forward pass; texts are short.
    """

    embedder: Embeds
    batch_tokens: int | None = None
    max_items: int | None = None
    workers: int | None = 0
    cache: EmbeddingCache | None = None
    on_error: str = "fail"
    max_media: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    num_encoded: int = 0  # distinct items that went through the model, over all ranks and calls

    def __post_init__(self) -> None:
        self._prepare = _Prepare(self.embedder.processor)
        self._workers = workers_for(self.embedder.device.type) if self.workers is None else self.workers

    def encode(self, items: Iterable[Item], progress: str | None = None) -> np.ndarray:
        """Raw vectors (N, D) float32 in the order of `items`, on every rank.

        Raises `ItemError` for the first item that cannot be used (unless on_error is "skip").
        """
        items = items if isinstance(items, Sequence) else list(items)
        named, of_input = first_seen(key_digests(items))  # the rows that differ by name, ...
        measured = measure_over_ranks(self.embedder.processor, Lazy(items.__getitem__, named))
        distinct, of_named = first_seen(measured.digests)  # ... and of those the ones that differ by content
        rows = named[distinct]
        for i in sorted(measured.problems):
            if distinct[of_named[i]] == i:
                self._note(items[int(named[i])], measured.problems[i])
        vectors = np.full((len(rows), self.embedder.dim), np.nan, dtype=np.float32)
        is_usable = np.ones(len(named), dtype=bool)
        is_usable[list(measured.problems)] = False
        digests, lengths = measured.digests[distinct], measured.num_tokens[distinct]
        self._fill(vectors, Lazy(items.__getitem__, rows), digests, lengths, is_usable[distinct], progress)
        return vectors if len(rows) == len(items) else vectors[of_named[of_input]]

    def _budget(self, num_tokens: int) -> int:
        """Tokens of a forward pass, for a list of so many; does not depend on threads, ranks or workers."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        device = self.embedder.device.type
        most = BATCH_TOKENS.get(device, BATCH_TOKENS["cuda"])
        return min(most, max(SHARED_TOKENS, num_tokens // SHARED_BATCHES)) if device == "cpu" else most

    def _note(self, item: Item, problem: str | None) -> None:
        if problem is None:
            return
        if self.on_error == "fail":
            raise ItemError(problem, item)
        self.skipped[item.describe()] = problem

    def _fill(
        self,
        vectors: np.ndarray,
        items: Sequence[Item],
        digests: np.ndarray,
        lengths: np.ndarray,
        is_usable: np.ndarray,
        label: str | None,
    ) -> None:
        """Fill `vectors` of distinct items: from the cache, or by this and the other ranks."""
        tag = hashlib.sha256(digests.data).digest()[:16]
        of_this_list, of_other_lists = self._known(digests, tag, vectors)
        rows = np.flatnonzero(is_usable & ~of_other_lists)
        budget = self._budget(int(lengths[rows].sum()))
        limits: tuple[int | None, list[bool] | None] = (self.max_items, None)
        if self.max_media is not None:
            limits = self.max_media, [bool(items[row].media) for row in rows.tolist()]
        batches = [rows[batch] for batch in token_batches(lengths[rows], budget, *limits)]
        todo = [batch for batch in batches if not of_this_list[batch].all()]
        share = [todo[i] for i in balanced(_costs(todo, lengths), distributed.world_size())[distributed.rank()]]
        done, problems = self._encode_batches(vectors, items, digests, tag, share, label, sum(map(len, todo)))
        mine = vectors[done if distributed.world_size() > 1 else done[:0]]  # a copy, for the others
        for rank, (encoded, values) in enumerate(distributed.gather_arrays((done, mine))):
            self.num_encoded += len(encoded)
            if rank != distributed.rank():
                vectors[encoded] = values
                if self.cache:
                    self.cache.remember(digests[encoded], tag, values, write=False)
        if self.cache:
            self.cache.settle()
        for row, problem in (entry for part in distributed.gather_objects(problems) for entry in part):
            vectors[row] = np.nan
            self._note(items[row], problem)

    def _known(self, digests: np.ndarray, tag: bytes, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What every rank has in its cache, as `EmbeddingCache.lookup`; ranks on other machines may see other disks."""
        if self.cache is None:
            return np.zeros(len(digests), dtype=bool), np.zeros(len(digests), dtype=bool)
        parts = np.stack(list(distributed.gather_arrays(np.stack(self.cache.lookup(digests, tag, vectors)))))
        return np.logical_and.reduce(parts[:, 0]), np.logical_and.reduce(parts[:, 1])

    def _encode_batches(
        self,
        vectors: np.ndarray,
        items: Sequence[Item],
        digests: np.ndarray,
        tag: bytes,
        batches: list[np.ndarray],
        label: str | None,
        total: int,
    ) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """Fill `vectors` of this rank's batches, and the cache: (rows, [(row, problem)])."""
        done, problems = [np.empty(0, dtype=np.int64)], list[tuple[int, str]]()
        try:
            with bar(total, label if distributed.rank() == 0 else None, "item") as shown:
                for rows, values, failed in self._forward(items, batches):
                    vectors[rows] = values
                    done.append(rows)
                    problems += failed
                    if self.cache:
                        self.cache.remember(digests[rows], tag, values, write=True)
                    if failed and self.on_error == "fail":
                        break  # the other ranks finish their share; all of them raise after the gathering
                    shown.update(min(len(rows) * distributed.world_size(), total - shown.n))
        finally:
            if self.cache:
                self.cache.flush()  # also when interrupted
        return np.concatenate(done), problems

    def _forward(
        self, items: Sequence[Item], batches: list[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, list]]:
        """(rows, raw vectors, problems) of each batch in turn."""
        import torch

        embedder = self.embedder

        def vectors_of(inputs: Batch | None) -> np.ndarray:
            if inputs is None:
                return np.empty((0, embedder.dim), dtype=np.float32)
            with torch.inference_mode():
                vectors: np.ndarray = embedder(inputs, normalize=False).cpu().numpy()
            return vectors

        tasks = ((rows, [items[row] for row in rows]) for rows in batches)
        prepared = run_ahead(self._prepare, tasks, self._workers, _describe)
        was_training = embedder.training
        embedder.eval()
        try:
            with forwards_at_once(embedder.device.type, len(batches)) as several:
                for (rows, _, problems), vectors in several(lambda batch: vectors_of(batch[1]), prepared):
                    yield rows, vectors, problems
        finally:
            embedder.train(was_training)


def _costs(batches: list[np.ndarray], lengths: np.ndarray) -> list[int]:
    """Tokens of each batch."""
    return [int(lengths[rows].sum()) for rows in batches]


@contextlib.contextmanager
def forwards_at_once(device: str, num_batches: int) -> Iterator[Callable[..., Iterator[tuple[Prepared, np.ndarray]]]]:
    """A map over batches, giving (batch, result) in order; on a CPU with several threads, several batches at once.

    A forward pass has thousands of short operations, and a team of threads ends each of them together. Beside other
    work one thread of the team is often off its core, and the others wait for it every time. So the threads share
    batches, not operations: each takes whole batches and waits for nobody.
    """
    import torch

    num_threads = torch.get_num_threads()
    at_once = 1 if device != "cpu" else min(num_threads, num_batches, FORWARDS_AT_ONCE)
    if at_once < 2:
        yield lambda function, batches: ((batch, function(batch)) for batch in batches)
        return
    torch.set_num_threads(num_threads // at_once)
    try:
        with ThreadPoolExecutor(at_once) as pool:

            def several(
                function: Callable[[Prepared], np.ndarray], batches: Iterable[Prepared]
            ) -> Iterator[tuple[Prepared, np.ndarray]]:
                waiting: deque[tuple[Prepared, Future[np.ndarray]]] = deque()
                for batch in batches:
                    waiting.append((batch, pool.submit(function, batch)))
                    if len(waiting) > at_once:
                        yield waiting[0][0], waiting.popleft()[1].result()
                while waiting:
                    yield waiting[0][0], waiting.popleft()[1].result()

            yield several
    finally:
        torch.set_num_threads(num_threads)


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
        inputs = collate(processed) if processed else None
        return np.asarray(good, dtype=np.int64), inputs, problems


def _describe(task: tuple[np.ndarray, list[Item]]) -> str:
    shown = ", ".join(item.describe() for item in task[1][:3])
    return f"{len(task[1])} items: {shown}" + (", ..." if len(task[1]) > 3 else "")


def unit(vectors: np.ndarray, in_place: bool = False) -> np.ndarray:
    """Rows (N, D) float32 divided by their L2 norm; a zero row stays zero."""
    units = vectors if in_place else np.empty_like(vectors)
    norms: Callable[..., np.ndarray] = np.linalg.norm
    for start in range(0, len(vectors), UNIT_ROWS):  # in blocks: the norm takes as much memory as what it is of
        block = vectors[start : start + UNIT_ROWS]
        units[start : start + UNIT_ROWS] = block / np.maximum(norms(block, axis=1, keepdims=True), 1e-12)
    return units
