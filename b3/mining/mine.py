"""Mine batches: from teacher embeddings to a batch plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from b3 import distributed
from b3.mining.checks import Parameters, check_arrays, check_parameters, window_width
from b3.mining.communities import REFINED, budget, find_communities
from b3.mining.negatives import draw_negatives
from b3.mining.plan import BatchPlan
from b3.mining.rank import Ranks, join_ranks, rank_targets, search_recall
from b3.mining.report import make_report, peak_memory
from b3.mining.stages import Clock, Stages
from b3.mining.vectors import DistinctTargets, distinct_targets, embeddings_fingerprint, unit_rows

Progress = Callable[[str, int, int], None]


def mine(
    queries: np.ndarray,
    targets: np.ndarray,
    p: int = 30,
    m: int = 100,
    community_size: int = 32,
    hard_negatives: int = 5,
    seed: int = 0,
    *,
    edges: str | None = None,
    veto: bool = True,
    penalty: int = 0,
    partitioner: str = "anneal",
    refine_passes: int = 30,
    piece_rows: int | None = None,
    max_similarity: float | None = None,
    max_relative: float | None = None,
    search: str = "exact",
    progress: Progress | None = None,
    data_fingerprint: str | None = None,
    teacher: str | None = None,
    device: str = "cpu",
    block_rows: int | None = None,
    stages: Stages | None = None,
) -> BatchPlan:
    """Group the rows of a data set into communities of hard negatives of each other.

    For every query, all distinct targets of the data set are ranked by cosine similarity (the own one included; equal
    target rows count once). Targets at ranks [p, p + m) are its hard negatives: above p they are likely to be right,
    below p + m they are easy. Rows are joined in a graph by that relation and the graph is cut into communities of
    exactly K rows ("Breaking the Batch Barrier", arXiv 2505.11293, section 3).

    Args:
        queries, targets: (N, D) teacher embeddings, row i of both being a training pair; float16, 32 or 64, any
            memory order, also memory-mapped; need not be normalised.
        p: ranks skipped at the top.
        m: width of the window; clipped where fewer than p + m distinct targets exist (``report["window"]`` says so).
        community_size: K.
        hard_negatives: h, hard negatives drawn for each row (0: none).
        seed: of all random choices. The result depends on the arguments up to `search` alone.
        edges: "union" (a pair counts for each direction that holds) or "mutual" (both must hold; the paper's). Default:
            union, and mutual for the partitioner "paper".
        veto: drop pairs of which one ranks the other's target above its window (union only; mutual implies it).
        penalty: what such a pair in one community costs, in units of a mined negative; 0 only gains nothing by it.
        partitioner: "anneal" (annealed swaps from random communities), "metis" (recursive METIS, repair of the sizes,
            annealed swaps), "paper" (the authors' METIS call and repair), "kmeans" (balanced k-means of the pairs, no
            windows) or "random" (seeded permutation).
        refine_passes: passes of annealed swaps ("anneal" and "metis").
        piece_rows: data sets with more rows are first cut into pieces of similar rows, at most so many each, by
            balanced k-means; communities do not cross pieces. Bounds memory and time of the graph; None: never.
        max_similarity: a target of the window that the teacher scores above this is treated as ranked above it.
        max_relative: the same for a score above this share of the positive's (NV-Retriever, arXiv 2407.15831).
        search: "exact", or "ivf": approximate, for very large N; ``report["search_recall"]`` measures it.
        progress: called as ``progress(stage, done, total)``.
        data_fingerprint, teacher: recorded in the manifest.
        device: torch device for ranking large inputs.
        block_rows: queries ranked at a time; a matter of memory only.
        stages: where finished stages are kept for an interrupted run to continue from.

    Raises:
        InputError: for arrays or parameters that cannot be used, naming the value and the limit.

    Example:
        >>> plan = mine(queries, targets, p=30, m=100, community_size=32, hard_negatives=5)
        >>> plan.communities.shape
        (3125, 32)
    """
    queries, targets = check_arrays(queries, targets)
    chosen = parameters(
        len(queries), p, m, community_size, hard_negatives, seed, edges=edges, veto=veto, penalty=penalty,
        partitioner=partitioner, refine_passes=refine_passes, piece_rows=piece_rows, max_similarity=max_similarity,
        max_relative=max_relative, search=search, block_rows=block_rows,
    )  # fmt: skip
    ranked = rank_pairs(queries, targets, chosen, Clock(progress), device, block_rows, stages)
    assert ranked is not None
    return plan_pairs(ranked, chosen, data_fingerprint, teacher, stages)


def parameters(
    count: int,
    p: int,
    m: int,
    community_size: int,
    hard_negatives: int,
    seed: int,
    *,
    edges: str | None,
    veto: bool,
    penalty: int,
    partitioner: str,
    refine_passes: int,
    piece_rows: int | None,
    max_similarity: float | None,
    max_relative: float | None,
    search: str,
    block_rows: int | None = None,
) -> Parameters:
    """The parameters of `mine` for `count` rows, checked."""
    # Integers of numpy overflow, and json does not take them.
    p, m, community_size, hard_negatives, seed, refine_passes, penalty = (
        int(value) if isinstance(value, np.integer) else value
        for value in (p, m, community_size, hard_negatives, seed, refine_passes, penalty)
    )
    chosen = Parameters(
        p=p, m=m, K=community_size, h=hard_negatives, edges=edges or ("mutual" if partitioner == "paper" else "union"),
        veto=bool(veto), penalty=penalty, partitioner=partitioner,
        refine_passes=refine_passes if partitioner in REFINED else 0, piece_rows=piece_rows,
        max_similarity=max_similarity, max_relative=max_relative, search=search, seed=seed,
    )  # fmt: skip
    check_parameters(chosen, count, refine_passes, block_rows)
    return chosen


@dataclass(frozen=True)
class Ranked:
    """The first half of mining: unit vectors, distinct targets, and the ranks of all rows.

    Attributes: units (N, D) float32 queries on the grid; fingerprint: of the embeddings; facts: for the report.
    """

    units: np.ndarray
    distinct: DistinctTargets
    ranks: Ranks
    fingerprint: str
    facts: dict[str, Any]
    clock: Clock


def rank_pairs(
    queries: np.ndarray,
    targets: np.ndarray,
    chosen: Parameters,
    clock: Clock,
    device: str = "cpu",
    block_rows: int | None = None,
    stages: Stages | None = None,
    owner: int | None = None,
) -> Ranked | None:
    """Rank all pairs.

    With `owner`, all ranks of the process group call this with the same arguments, each ranks an equal part of the
    rows, and rank `owner` gets the result, the others None.
    """
    queries, targets = check_arrays(queries, targets)
    with clock.stage("normalise"):
        fingerprint = embeddings_fingerprint(queries, targets)
        units, distinct = unit_rows(queries, "queries"), distinct_targets(unit_rows(targets, "targets"))
        width = window_width(chosen, len(distinct))
    here = owner is None or distributed.rank() == owner
    key = Stages.key(
        embeddings=fingerprint, p=chosen.p, m=width, K=chosen.K, limits=str(chosen.limits), ivf=chosen.search
    )
    with clock.stage("rank"):
        stored = stages.load("ranks", key) if stages and here else None
        if _anywhere(stored is not None, owner):
            ranks = None if stored is None else Ranks(p=chosen.p, m=width, num_targets=len(distinct), **stored)
        else:
            share = (0, 1) if owner is None else (distributed.rank(), distributed.world_size())
            part = rank_targets(
                units, distinct, chosen.p, width, chosen.K - 1, device, block_rows, clock.progress, chosen.limits,
                share, chosen.search,
            )  # fmt: skip
            parts = [part] if owner is None else distributed.gather_objects_to(part, owner)
            ranks = join_ranks(parts) if parts else None
            if stages and ranks is not None:
                stages.save("ranks", key, ranks.arrays)
    if ranks is None:
        return None
    facts: dict[str, Any] = {"search": chosen.search}
    if chosen.search != "exact":
        with clock.stage("recall"):
            facts["search_recall"] = search_recall(units, ranks, distinct)
    return Ranked(units, distinct, ranks, fingerprint, facts, clock)


def _anywhere(found: bool, owner: int | None) -> bool:
    """Whether a rank found it."""
    return found if owner is None else any(distributed.gather_objects(found))


def plan_pairs(
    ranked: Ranked,
    chosen: Parameters,
    data_fingerprint: str | None = None,
    teacher: str | None = None,
    stages: Stages | None = None,
) -> BatchPlan:
    """The second half of mining: communities, hard negatives, report."""
    units, distinct, ranks, clock = ranked.units, ranked.distinct, ranked.ranks, ranked.clock
    communities, remainder, facts = find_communities(units, ranks, distinct, chosen.cut, clock)
    negatives = None
    if chosen.h:
        with clock.stage("negatives"):
            negatives = draw_negatives(ranks, distinct, communities, remainder, chosen.h, chosen.seed)
            facts["hard_negatives_missing"] = int((negatives < 0).sum())
    with clock.stage("report"):
        report = (
            make_report(
                units,
                ranks,
                distinct,
                communities,
                chosen.seed,
                negatives=negatives,
                partitioner=chosen.partitioner,
                budget=budget(chosen.cut, len(units)),
            )
            | ranked.facts
            | facts
        )
    report |= {"seconds": clock.seconds, "peak_memory_bytes": peak_memory()}
    manifest = {
        "data_fingerprint": data_fingerprint,
        "embeddings_fingerprint": ranked.fingerprint,
        "teacher": teacher,
        "N": len(units),
        "D": units.shape[1],
        **asdict(chosen),
        "versions": _versions(),
        "seconds": round(sum(clock.seconds.values()), 3),
    }
    return BatchPlan(communities, remainder, negatives, report, manifest)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from b3 import __version__

    found = {"b3": __version__}
    for name in ("numpy", "scipy", "pymetis", "numba", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
