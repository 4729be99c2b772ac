"""Exact top-k search over distinct targets: a fast rough pass, then exact scores of all that it cannot rule out.

A rough score is off by at most some e that can be computed. With f the k-th best rough score of a query, every true
member of its top k has a rough score of at least f - 2e: all targets above that bound are candidates, and their exact
scores (`b3.mining.vectors`) decide. The result is that of exact arithmetic, whatever the rough pass computes in.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from b3.errors import RunError

SMALL = 6000  # up to this many distinct targets the float64 product alone is as fast and loads no other library
SCORES_IN_BLOCK = 1 << 24
SCORES_ON_DEVICE = 1 << 28  # 1 GiB in float32
TILE = 8192
PROBED_SHARE = 0.2  # share of the cells that a query looks into
MIN_CELL_TARGETS = 64
MAX_TRAINING_TARGETS = 256  # per cell
MAX_ON_GPU = 2048  # results and cells per query that faiss takes on a GPU
ROOM = 8  # a query's candidates are thinned out when they exceed this many times the depth

Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_search(
    targets: np.ndarray, depth: int, method: str = "exact", device: str | None = None
) -> tuple[Search, int]:
    """(search, number of queries per call that suits it).

    The search takes queries (n, D) to (ids (n, depth), exact scores (n, depth) float64) in rank order, ties by id.

    Args:
        targets: (U, D), like the queries float32 unit vectors on the grid.
        depth: 0 < depth <= U.
        method: "exact" or "ivf".
        device: torch device for large inputs; default: a GPU if there is one.
    """
    assert 0 < depth <= len(targets)
    if method == "ivf":
        return CellSearch(targets, depth), 1024
    if len(targets) <= SMALL:
        wide = targets.astype(np.float64).T
        step = max(1, min(4096, SCORES_IN_BLOCK // len(targets)))
        return lambda queries: select(queries.astype(np.float64) @ wide, depth), step
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return TileSearch(targets, depth), 1024
    return DeviceSearch(targets, depth, device), max(1, min(4096, SCORES_ON_DEVICE // len(targets)))


def select(scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` best of each row of scores (n, U), ties by column."""
    num = scores.shape[1]
    bound = np.partition(scores, num - depth, axis=1)[:, num - depth]
    rows, columns = np.nonzero(scores >= bound[:, None])  # at least `depth` per row, more where the last ones tie
    values = scores[rows, columns]
    order = np.lexsort((columns, -values, rows))
    starts = np.searchsorted(rows, np.arange(len(scores)))
    top = order[starts[:, None] + np.arange(depth)]
    return columns[top], values[top]


def pair_scores(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Exact scores (n, k) float64 of queries (n, D) with k targets each (n, k, D), both on the grid."""
    return np.matmul(targets.astype(np.float64), queries.astype(np.float64)[:, :, None])[:, :, 0]


def rank_candidates(
    queries: np.ndarray, targets: np.ndarray, ids: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, exact scores), each (n, depth), of the best of the candidates `ids` (n, k) by rank, ties by id."""
    ids = np.sort(ids, axis=1)
    scores = np.empty(ids.shape)
    step = max(1, SCORES_IN_BLOCK // (ids.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), step):
        span = slice(start, start + step)
        scores[span] = pair_scores(queries[span], targets[ids[span]])
    by_rank = np.argsort(-scores, axis=1, kind="stable")[:, :depth]  # stable over sorted ids: ties by id
    return np.take_along_axis(ids, by_rank, axis=1), np.take_along_axis(scores, by_rank, axis=1)


def error_of_products(dim: int) -> float:
    """Most that a float32 dot product of unit vectors is off, for any order of summation (Higham 2002, section 3.1)."""
    return 1.01 * (dim + 4) * 2.0**-24


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, products of float32 matrices are those of float32, as `error_of_products` says.

    NVIDIA's containers let torch start with TF32, and a program may ask for it or for bfloat16: candidates would be
    lost without notice.
    """
    import torch

    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a program has used both of torch's interfaces, which torch no longer reads as one
        before = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        assert not torch.backends.cuda.matmul.allow_tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    import torch

    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def fast_int8(dim: int) -> bool:
    """Whether the CPU multiplies matrices of int8 in hardware, and exactly.

    torch's product is tried with the largest numbers: without such instructions it adds pairs in 16 bits, and clips.
    """
    import torch

    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)() or not hasattr(torch, "_int_mm"):
        return False
    ends = torch.full((16, dim), 127, dtype=torch.int8)
    ends[::2], ends[:, ::3] = -127, 126
    products: bool = torch.equal(torch._int_mm(ends, ends.T).long(), (ends.double() @ ends.double().T).long())
    return products


def fast_kinds(dim: int) -> list[str]:
    """Kinds of products that this CPU has instructions for, the fastest first; float32 is always one."""
    return [*["bfloat16"] * fast_bfloat16(), *["int8"] * fast_int8(dim), "float32"]


COARSE = 0.02  # a rounding error of targets above which int8 would leave too many candidates


class TileSearch:
    """On the CPU: products of tiles in bfloat16 or int8 where fast, else in float32; candidates by compiled code.

    The error of a rough score is that of rounding both vectors, |q - q'| + |q'| |t - t'| by Cauchy-Schwarz; that of the
    float32 sum (products of int8 are exact); and that of rounding the result to bfloat16, 2**-9 of its size. int8:
    multiples of 1/127 of a query's largest number, and of the largest of all targets.

    Args:
        kind: "bfloat16", "int8" or "float32"; None: the fastest that is not too coarse.
    """

    def __init__(self, targets: np.ndarray, depth: int, kind: str | None = None) -> None:
        import torch

        self.targets, self.depth = targets, depth
        self.unit = float(max(np.abs(part).max() for part in np.array_split(targets, -(-len(targets) // TILE)))) / 127
        parts = torch.from_numpy(targets).split(TILE)
        for self.kind in [kind] if kind else fast_kinds(targets.shape[1]):
            rounded = [self._rounded(part, self.unit) for part in parts]
            self.target_error = max(float(error.max()) for _, error in rounded)
            if kind or self.kind != "int8" or self.target_error < COARSE:
                break
        self.rough_targets = [part for part, _ in rounded]
        self.result_error = 2.0**-9 if self.kind == "bfloat16" else 0.0
        self.scores = torch.empty(
            0, dtype={"bfloat16": torch.bfloat16, "int8": torch.int32}.get(self.kind, torch.float32)
        )
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def _rounded(self, vectors: Any, unit: Any) -> tuple[Any, Any]:
        """(n, D) float32 vectors as this search multiplies them, and the norm (n,) of what that leaves out."""
        import torch

        if self.kind == "int8":
            rough = (vectors.double() / unit).round().clamp(-127, 127).to(torch.int8)
            back = rough.double() * unit
            if rough.shape[1] == 1:  # torch's product of int8 is wrong for a single column
                rough = torch.nn.functional.pad(rough, (0, 1))
        else:
            rough = vectors.to(torch.bfloat16 if self.kind == "bfloat16" else torch.float32)
            back = rough.double()
        return rough, (vectors.double() - back).norm(dim=1)

    def _tile(self, queries: Any, targets: Any) -> np.ndarray:
        """(n, T) rough scores of both `_rounded`, as `b3.mining.search_kernels` reads them, until the next tile."""
        import torch

        shape = len(queries), len(targets)
        if self.scores.numel() < shape[0] * shape[1]:  # kept: to the system, fresh memory is more work than the product
            self.scores = self.scores.new_empty(shape[0] * shape[1])
        scores: Any = self.scores[: shape[0] * shape[1]].view(shape)
        if self.kind == "int8":
            torch._int_mm(queries, targets.T, out=scores)
            return scores.numpy()
        bits: Any = torch.int16 if self.kind == "bfloat16" else torch.int32
        return torch.matmul(queries, targets.T, out=scores).view(bits).numpy()

    def __call__(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        from b3.mining.search_kernels import NO_FLOOR, collect, finish

        count, most = len(queries), self.depth * ROOM
        exact = torch.from_numpy(np.ascontiguousarray(queries))
        own_unit = exact.abs().amax(dim=1, keepdim=True).double() / 127
        rough, left_out = self._rounded(exact, own_unit)
        rounding: np.ndarray = left_out.numpy()
        error = 1.01 * (rounding + (1.01 + rounding) * self.target_error) + error_of_products(queries.shape[1])
        unit = own_unit[:, 0].numpy() * self.unit if self.kind == "int8" else np.zeros(count)
        # Candidates of each query: keys of their rough scores (a key orders floats as integers) and ids, `counts` of
        # them; what has a key up to the floor is ruled out.
        room = most + 2 * TILE
        keys = np.empty((count, room), dtype=np.int16 if self.result_error else np.int32)
        candidate_ids = np.empty((count, room), dtype=np.int32)
        counts, floors = np.zeros(count, dtype=np.int64), np.full(count, NO_FLOOR)
        shares = [slice(s[0], s[-1] + 1) for s in np.array_split(np.arange(count), self.threads) if len(s)]
        for number, part in enumerate(self.rough_targets):
            with torch.inference_mode(), full_precision():
                tile = self._tile(rough, part)

            def add(s: slice, tile: Any = tile, start: int = number * TILE) -> None:
                candidates = keys[s], candidate_ids[s], counts[s], floors[s]
                collect(tile[s], start, *candidates, error[s], self.result_error, unit[s], self.depth, most)

            list(self.pool.map(add, shares))
        ids, scores = np.empty((count, self.depth), dtype=np.int64), np.empty((count, self.depth))

        def rank(s: slice) -> None:
            candidates = keys[s], candidate_ids[s], counts[s]
            finish(queries[s], self.targets, *candidates, error[s], self.result_error, unit[s], ids[s], scores[s])

        list(self.pool.map(rank, shares))
        in_full(queries, self.targets, np.flatnonzero(counts < 0), ids, scores)
        return ids, scores


def in_full(queries: np.ndarray, targets: np.ndarray, rows: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> None:
    """Fill ids and scores (n, depth) of some rows from the exact scores of all targets, which are widened in pieces."""
    step = max(1, SCORES_IN_BLOCK // len(targets))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        wide = queries[part].astype(np.float64)
        pieces = [wide @ targets[s : s + TILE].astype(np.float64).T for s in range(0, len(targets), TILE)]
        ids[part], scores[part] = select(np.concatenate(pieces, axis=1), ids.shape[1])


class DeviceSearch:
    """On an accelerator: products in float32 and their top by torch; what these cannot decide is computed in full."""

    def __init__(self, targets: np.ndarray, depth: int, device: str) -> None:
        import torch

        self.targets, self.depth = targets, depth
        self.width = min(len(targets), depth + 16 + depth // 8)
        self.margin = 2 * error_of_products(targets.shape[1])
        self.device = torch.device(device)
        self.on_device = torch.from_numpy(targets).to(self.device)

    def __call__(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode(), full_precision():
            block = torch.from_numpy(np.ascontiguousarray(queries)).to(self.device)
            top = torch.topk(block @ self.on_device.T, self.width, dim=1)
            rough, columns = top.values.cpu().numpy(), top.indices.cpu().numpy()
        ids, scores = rank_candidates(queries, self.targets, columns, self.depth)
        if self.width < len(self.targets):
            undecided = np.flatnonzero(rough[:, -1] >= rough[:, self.depth - 1] - self.margin)
            in_full(queries, self.targets, undecided, ids, scores)
        return ids, scores


class CellSearch:
    """Approximate, for very many targets: faiss finds candidates in an inverted file, exact scores rank them.

    A query looks only into the cells whose centroids are nearest to it; what is elsewhere is not found, and the report
    says how much that is (`b3.mining.rankings.search_recall`). Cells are trained on one thread from a fixed seed. On
    100,000 rows the exact search is faster (docs/log.md); this one is for many millions. The trained file moves to the
    rank's GPU where faiss was built for one (`pip install 'b3[gpu]'`) and its limits allow.

    Raises `RunError` if faiss is not installed.
    """

    def __init__(self, targets: np.ndarray, depth: int) -> None:
        try:
            import faiss
        except ImportError:
            raise RunError("mining.search ivf needs faiss; pip install 'b3[faiss]', or use search exact") from None
        count, dim = targets.shape
        self.targets, self.depth = targets, depth
        cells = max(1, min(int(4 * count**0.5), count // MIN_CELL_TARGETS))
        self.index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.seed, self.index.cp.max_points_per_centroid = 1, MAX_TRAINING_TARGETS
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        self.index.train(targets)
        faiss.omp_set_num_threads(threads)
        self.index.add(targets)
        self.index.nprobe = int(np.ceil(PROBED_SHARE * cells))
        gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
        if gpus and max(depth, self.index.nprobe) <= MAX_ON_GPU:
            gpu = int(os.environ.get("LOCAL_RANK", "0")) % gpus
            self.resources = faiss.StandardGpuResources()  # must live as long as the index
            self.index = faiss.index_cpu_to_gpu(self.resources, gpu, self.index)

    def __call__(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, ids = self.index.search(np.ascontiguousarray(queries), self.depth)
        for row in np.flatnonzero((ids < 0).any(axis=1)):  # fewer found than asked for: fill up with the first others
            missing = ids[row] < 0
            others = np.setdiff1d(np.arange(min(len(self.targets), 2 * self.depth)), ids[row])
            ids[row, missing] = others[: missing.sum()]
        return rank_candidates(queries, self.targets, ids, self.depth)
