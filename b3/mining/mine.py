"""Mine batches: from teacher embeddings to a batch plan."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from b3 import distributed
from b3.console import Clock, Progress, peak_memory
from b3.errors import InputError
from b3.files import Stages
from b3.mining.batch_negatives import candidate_arrays
from b3.mining.checks import check_arrays, check_parameters, check_rules, windows
from b3.mining.communities import find_communities
from b3.mining.labels import RankTo, merge_facts, rank_labels, restrict_targets, split_rows
from b3.mining.negatives import NegativeRules, draw_negatives, narrow
from b3.mining.parameters import REFINED, Parameters
from b3.mining.plan import BatchPlan
from b3.mining.rankings import Ranks, join_ranks, rank_targets, search_recall
from b3.mining.report import make_report
from b3.mining.vectors import DistinctTargets, distinct_targets, embeddings_fingerprint, unit_rows


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
    partitioner: str = "anneal",
    refine_passes: int = 30,
    piece_rows: int | None = None,
    search: str = "exact",
    negative_rules: NegativeRules | None = None,
    target_unit: str = "distinct",
    subset_rows: int | None = None,
    progress: Progress | None = None,
    data_fingerprint: str | None = None,
    teacher: str | None = None,
    device: str | None = None,
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
        seed: of all random choices. The result depends on the arguments up to `subset_rows` alone.
        edges: "union" (a pair counts for each direction that holds) or "mutual" (both must hold; the paper's). Default:
            union, and mutual for the partitioner "paper".
        veto: drop pairs of which one ranks the other's target above its window (union only; mutual implies it).
        partitioner: "anneal" (annealed swaps from random communities), "paper" (the authors' METIS
            call and repair), "kmeans" (balanced k-means of the pairs, no
            windows) or "random" (seeded permutation).
        refine_passes: passes of annealed swaps ("anneal").
        piece_rows: data sets with more rows are first cut into pieces of similar rows, at most so many each, by
            balanced k-means; communities do not cross pieces. Bounds memory and time of the graph; None: never.
        search: "exact", or "ivf": approximate, for very large N; ``report["search_recall"]`` measures it.
        negative_rules: what may be drawn as a hard negative, and how.
        target_unit: "distinct", or "label30" for classification as the paper's scripts do it (`b3.mining.labels`);
            this sets p to 0, m to 30 % of the labels and edges to mutual, and counts negatives in the first 2h labels.
        subset_rows: rank and partition random subsets of so many rows each on its own; what is left over of each goes
            to the remainder, which may then exceed K.
        progress: called as ``progress(stage, done, total)``.
        data_fingerprint, teacher: recorded in the manifest.
        device: torch device for ranking large inputs; default: a GPU if there is one.
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
        len(queries), p, m, community_size, hard_negatives, seed, edges=edges, veto=veto,
        partitioner=partitioner, refine_passes=refine_passes, piece_rows=piece_rows, search=search,
        target_unit=target_unit, subset_rows=subset_rows,
        block_rows=block_rows,
    )  # fmt: skip
    rules = check_rules(negative_rules, hard_negatives)
    ranked = rank_pairs(queries, targets, chosen, rules, Clock(progress), device, block_rows, stages)
    assert ranked is not None
    return plan_pairs(ranked, data_fingerprint, teacher)


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
    partitioner: str,
    refine_passes: int,
    piece_rows: int | None,
    search: str,
    target_unit: str,
    subset_rows: int | None,
    block_rows: int | None = None,
) -> Parameters:
    """The parameters of `mine` for `count` rows, checked."""
    # Integers of numpy overflow, and json does not take them.
    p, m, community_size, hard_negatives, seed, refine_passes = (
        int(value) if isinstance(value, np.integer) else value
        for value in (p, m, community_size, hard_negatives, seed, refine_passes)
    )
    chosen = Parameters(
        p=p, m=m, K=community_size, h=hard_negatives,
        edges=edges or ("mutual" if partitioner == "paper" or target_unit == "label30" else "union"),
        veto=bool(veto), partitioner=partitioner,
        refine_passes=refine_passes if partitioner in REFINED else 0, piece_rows=piece_rows,
        search=search,
        target_unit=target_unit, subset_rows=subset_rows, seed=seed,
    )  # fmt: skip
    check_parameters(chosen, count, refine_passes, block_rows)
    return chosen


@dataclass(frozen=True)
class Ranked:
    """The first half of mining: unit vectors, distinct targets, and the ranks of all rows.

    Attributes:
        units: (N, D) float32 queries on the grid.
        ranks: with a window wide enough for communities and for hard negatives.
        chosen: the parameters, with the p and m that count; rules: of the hard negatives.
        width, counted: of the window of communities and of that of hard negatives.
        rank: ranks further queries over other targets, in the same way.
        fingerprint: of the embeddings; facts: for the report.
        stages, key: where finished stages are kept, and under which key the ranks are.
    """

    units: np.ndarray
    distinct: DistinctTargets
    ranks: Ranks
    chosen: Parameters
    rules: NegativeRules
    width: int
    counted: int
    rank: RankTo
    fingerprint: str
    facts: dict[str, Any]
    clock: Clock
    stages: Stages | None
    key: str


def rank_pairs(
    queries: np.ndarray,
    targets: np.ndarray,
    chosen: Parameters,
    rules: NegativeRules,
    clock: Clock,
    device: str | None = None,
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
        chosen, width, counted = windows(chosen, rules, len(distinct))

    def rank(part: np.ndarray, of: DistinctTargets, p: int, m: int, share: tuple[int, int] = (0, 1)) -> Ranks:
        options = share, chosen.search
        return rank_targets(part, of, p, m, chosen.K - 1, device, block_rows, clock.progress, *options)

    wide = max(width, counted)
    key = Stages.key(
        embeddings=fingerprint, p=chosen.p, m=wide, K=chosen.K, search=chosen.search,
        unit=chosen.target_unit,
    )  # fmt: skip
    with clock.stage("rank"):
        here = owner is None or distributed.rank() == owner
        stored = stages.load("ranks", key) if stages and here else None
        ranks: Ranks | None
        if _anywhere(stored is not None, owner):
            ranks = (
                None
                if stored is None
                else Ranks(p=chosen.p, num_targets=len(distinct), **_with_width(stored, chosen.p))
            )
        else:
            share = (0, 1) if owner is None else (distributed.rank(), distributed.world_size())
            part = _rank(units, distinct, chosen, wide, partial(rank, share=share))
            parts = [part] if owner is None else distributed.gather_arrays_to(part, owner)
            ranks = join_ranks(parts) if parts else None
            if stages and ranks is not None:
                stages.save("ranks", key, ranks.arrays)
    if ranks is None:
        return None
    facts: dict[str, Any] = {"search": chosen.search}
    if chosen.search != "exact":
        with clock.stage("recall"):
            facts["search_recall"] = search_recall(units, ranks, distinct)
    return Ranked(
        units, distinct, ranks, chosen, rules, width, counted, rank, fingerprint, facts, clock, stages, key
    )  # fmt: skip


def _with_width(stored: dict[str, np.ndarray], p: int) -> dict[str, Any]:
    return {**stored, "m": stored["order"].shape[1] - p}


def _anywhere(found: bool, owner: int | None) -> bool:
    """Whether a rank found it."""
    return found if owner is None else any(distributed.gather_objects(found))


def _rank(units: np.ndarray, distinct: DistinctTargets, chosen: Parameters, width: int, rank: RankTo) -> Ranks:
    """Ranks of the unit that was chosen, with a window of `width` where so many exist."""
    if chosen.target_unit == "label30":
        return rank_labels(units, distinct, width, rank)
    return rank(units, distinct, chosen.p, min(width, len(distinct) - chosen.p))


def plan_pairs(ranked: Ranked, data_fingerprint: str | None = None, teacher: str | None = None) -> BatchPlan:
    """The second half of mining: communities, hard negatives, report."""
    units, distinct, chosen, clock = ranked.units, ranked.distinct, ranked.chosen, ranked.clock
    ranks = narrow(ranked.ranks, ranked.width)
    communities, remainder, facts = _cut(ranked, ranks)
    drawn: dict[str, np.ndarray] = {}
    if chosen.h:
        with clock.stage("negatives"):
            groups = (narrow(ranked.ranks, ranked.counted), distinct, communities, remainder)
            if ranked.rules.scope == "batch":
                drawn = candidate_arrays(*groups, ranked.rules)
            else:
                drawn = {"hard_negatives": draw_negatives(*groups, chosen.h, chosen.seed, ranked.rules, units)}
                facts["hard_negatives_missing"] = int((drawn["hard_negatives"] < 0).sum())
    with clock.stage("report"):
        report = make_report(
            units,
            ranks,
            distinct,
            communities,
            chosen.seed,
            negatives=drawn.get("hard_negatives"),
            partitioner=chosen.partitioner,
            budget=chosen.budget(len(units)),
            compare_paper=chosen.target_unit == "distinct",
        )
    report |= {**ranked.facts, **facts, "seconds": clock.seconds, "peak_memory_bytes": peak_memory()}
    manifest = {
        "data_fingerprint": data_fingerprint,
        "embeddings_fingerprint": ranked.fingerprint,
        "teacher": teacher,
        "N": len(units),
        "D": units.shape[1],
        **asdict(chosen),
        "negatives": asdict(ranked.rules) if chosen.h else None,
        "versions": _versions(),
        "seconds": round(sum(clock.seconds.values()), 3),
    }
    return BatchPlan(communities, remainder, report=report, manifest=manifest, **drawn)


def _cut(ranked: Ranked, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(communities, remainder, facts for the report), found now or by an earlier call that was interrupted."""
    stages, key = ranked.stages, Stages.key(ranks=ranked.key, **asdict(ranked.chosen))
    stored = stages.load("communities", key) if stages else None
    if stored is not None:
        return stored["communities"], stored["remainder"], json.loads(str(stored["facts"]))
    if ranked.chosen.subset_rows:
        found = _by_subset(ranked)
    else:
        found = find_communities(ranked.units, ranks, ranked.distinct, ranked.chosen, ranked.clock)
    if stages:
        arrays = {"communities": found[0], "remainder": found[1], "facts": np.asarray(json.dumps(found[2]))}
        stages.save("communities", key, arrays)
    return found


def _by_subset(ranked: Ranked) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """As `find_communities`, ranked and partitioned in random subsets, each on its own."""
    units, chosen, clock = ranked.units, ranked.chosen, ranked.clock
    found, left, facts = [], [], []
    for rows in split_rows(len(units), chosen.subset_rows, chosen.seed):
        part = restrict_targets(ranked.distinct, rows)
        if len(rows) < chosen.K or len(part) == 1:
            left.append(rows)
            continue
        if chosen.p >= len(part) - 1:
            raise InputError(f"p {chosen.p} leaves no ranks in a subset of {len(rows)} rows with {len(part)} targets")
        with clock.stage("rank"):
            ranks = _rank(units[rows], part, chosen, chosen.m, ranked.rank)
        communities, remainder, fact = find_communities(units[rows], ranks, part, chosen, clock)
        found.append(rows[communities])
        left.append(rows[remainder])
        facts.append(fact)
    if not found:
        raise InputError(f"every subset of {chosen.subset_rows} rows has one target only; give larger subsets")
    communities = np.concatenate(found)
    return communities[np.argsort(communities[:, 0])], np.sort(np.concatenate(left)), merge_facts(facts)


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
