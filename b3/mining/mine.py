"""Mine batches: from teacher embeddings to a batch plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from b3.errors import InputError
from b3.mining.batch_negatives import candidate_arrays
from b3.mining.graph import Graph, build_graph
from b3.mining.labels import (
    RankTo,
    label_count,
    label_graph,
    merge_facts,
    rank_labels,
    restrict_targets,
    split_rows,
)
from b3.mining.negatives import NegativeRules, draw_negatives, narrow
from b3.mining.partition import (
    choose_remainder,
    communities_of,
    metis_labels,
    random_labels,
    reference_repair,
    repair,
)
from b3.mining.plan import BatchPlan
from b3.mining.rank import Ranks, rank_targets
from b3.mining.report import make_report, peak_memory
from b3.mining.vectors import DistinctTargets, distinct_targets, embeddings_fingerprint, unit_rows

Progress = Callable[[str, int, int], None]
EDGES = ("union", "mutual")
TARGET_UNITS = ("distinct", "label30")
PARTITIONERS = ("metis", "paper", "random")
SPARE_EDGES = 1_500_000  # where targets repeat, a small data set keeps more than m edges a row, up to this many in all


@dataclass(frozen=True)
class _Parameters:
    p: int
    m: int
    K: int
    h: int
    edges: str
    veto: bool
    partitioner: str
    refine_passes: int
    seed: int
    target_unit: str
    subset_rows: int | None


class _Clock:
    """Seconds and progress by stage."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.progress:
            self.progress(name, 0, 1)
        yield
        if self.progress:
            self.progress(name, 1, 1)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


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
    partitioner: str = "metis",
    refine_passes: int = 6,
    negative_rules: NegativeRules | None = None,
    target_unit: str = "distinct",
    subset_rows: int | None = None,
    progress: Progress | None = None,
    data_fingerprint: str | None = None,
    teacher: str | None = None,
    device: str = "cpu",
    block_rows: int | None = None,
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
        veto: drop pairs of which one ranks the other's target above p (union only; mutual implies it).
        partitioner: "metis" (recursive METIS, repair, swap refinement), "paper" (the authors' METIS call and repair)
            or "random" (seeded permutation).
        refine_passes: most passes of the swap refinement ("metis" only).
        negative_rules: what may be drawn as a hard negative, and how.
        target_unit: "distinct", or "label30" for classification as the paper's scripts do it (`b3.mining.labels`);
            this sets p to 0, m to 30 % of the labels and edges to mutual, and counts negatives in the first 2h labels.
        subset_rows: rank and partition random subsets of so many rows each on its own; what is left over of each goes
            to the remainder, which may then exceed K.
        progress: called as ``progress(stage, done, total)``.
        data_fingerprint, teacher: recorded in the manifest.
        device: torch device for ranking large inputs.
        block_rows: queries ranked at a time; a matter of memory only.

    Raises:
        InputError: for arrays or parameters that cannot be used, naming the value and the limit.

    Example:
        >>> plan = mine(queries, targets, p=30, m=100, community_size=32, hard_negatives=5)
        >>> plan.communities.shape
        (3125, 32)
    """
    queries, targets = _check_arrays(queries, targets)
    edges = edges or ("mutual" if partitioner == "paper" or target_unit == "label30" else "union")
    # Integers of numpy overflow, and json does not take them.
    p, m, community_size, hard_negatives, seed, refine_passes = (
        int(value) if isinstance(value, np.integer) else value
        for value in (p, m, community_size, hard_negatives, seed, refine_passes)
    )
    used = refine_passes if partitioner == "metis" else 0
    chosen = _Parameters(
        p, m, community_size, hard_negatives, edges, bool(veto), partitioner, used, seed, target_unit, subset_rows
    )
    rules = _check_rules(negative_rules, hard_negatives)
    _check_parameters(chosen, len(queries), refine_passes, block_rows)
    clock = _Clock(progress)
    with clock.stage("normalise"):
        fingerprint = embeddings_fingerprint(queries, targets)
        units, distinct = unit_rows(queries, "queries"), distinct_targets(unit_rows(targets, "targets"))
        chosen, width, counted = _windows(chosen, rules, len(distinct))

    def rank(queries: np.ndarray, distinct: DistinctTargets, p: int, m: int) -> Ranks:
        return rank_targets(queries, distinct, p, m, community_size - 1, device, block_rows, progress)

    with clock.stage("rank"):
        all_ranks = _rank(units, distinct, chosen, max(width, counted), rank)
        ranks = narrow(all_ranks, width)
    if subset_rows or target_unit == "label30":
        communities, remainder, facts = _by_subset(units, distinct, chosen, clock, rank)
    else:
        communities, remainder, facts = _communities(ranks, distinct, chosen, clock)
    drawn: dict[str, np.ndarray] = {}
    if hard_negatives:
        with clock.stage("negatives"):
            groups = (narrow(all_ranks, counted), distinct, communities, remainder)
            if rules.scope == "batch":
                drawn = candidate_arrays(*groups, rules)
            else:
                drawn = {"hard_negatives": draw_negatives(*groups, hard_negatives, seed, rules, units)}
                facts["hard_negatives_missing"] = int((drawn["hard_negatives"] < 0).sum())
    with clock.stage("report"):
        budget = max(chosen.m, SPARE_EDGES // len(units))
        given = drawn.get("hard_negatives")
        paper = target_unit == "distinct"
        options: dict[str, Any] = {"partitioner": partitioner, "budget": budget, "compare_paper": paper}
        report = make_report(units, ranks, distinct, communities, seed, negatives=given, **options)
        report |= facts
    report |= {"seconds": clock.seconds, "peak_memory_bytes": peak_memory()}
    manifest = {
        "data_fingerprint": data_fingerprint,
        "embeddings_fingerprint": fingerprint,
        "teacher": teacher,
        "N": len(queries),
        "D": queries.shape[1],
        **asdict(chosen),
        "negatives": asdict(rules) if hard_negatives else None,
        "versions": _versions(),
        "seconds": round(sum(clock.seconds.values()), 3),
    }
    return BatchPlan(communities, remainder, report=report, manifest=manifest, **drawn)


def _rank(units: np.ndarray, distinct: DistinctTargets, chosen: _Parameters, width: int, rank: RankTo) -> Ranks:
    """Ranks of the unit that was chosen, with a window of `width` where so many exist."""
    if chosen.target_unit == "label30":
        return rank_labels(units, distinct, width, rank)
    return rank(units, distinct, chosen.p, min(width, len(distinct) - chosen.p))


def _by_subset(
    units: np.ndarray, distinct: DistinctTargets, chosen: _Parameters, clock: _Clock, rank: RankTo
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """As `_communities`, ranked and partitioned in random subsets, each on its own."""
    found, left, facts = [], [], []
    for rows in split_rows(len(units), chosen.subset_rows, chosen.seed):
        part = restrict_targets(distinct, rows)
        if len(rows) < chosen.K or len(part) == 1:
            left.append(rows)
            continue
        if chosen.p >= len(part) - 1:
            raise InputError(f"p {chosen.p} leaves no ranks in a subset of {len(rows)} rows with {len(part)} targets")
        with clock.stage("rank"):
            ranks = _rank(units[rows], part, chosen, chosen.m, rank)
        communities, remainder, fact = _communities(ranks, part, chosen, clock)
        found.append(rows[communities])
        left.append(rows[remainder])
        facts.append(fact)
    if not found:
        raise InputError(f"every subset of {chosen.subset_rows} rows has one target only; give larger subsets")
    communities = np.concatenate(found)
    return communities[np.argsort(communities[:, 0])], np.sort(np.concatenate(left)), merge_facts(facts)


def _communities(
    ranks: Ranks, distinct: DistinctTargets, chosen: _Parameters, clock: _Clock
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(communities (C, K), remainder (N mod K,), facts for the report)."""
    count, size = len(ranks.own), chosen.K
    facts: dict[str, Any] = {}
    graph: Graph | None = None
    if chosen.partitioner != "random":
        with clock.stage("graph"):
            budget = max(chosen.m, SPARE_EDGES // count)
            if chosen.target_unit == "label30":
                graph = label_graph(ranks, distinct)
            else:
                graph = build_graph(ranks, distinct, chosen.edges, chosen.veto, budget, chosen.seed)
            facts = {"edges": graph.num_edges, "isolated_rows": int((np.diff(graph.indptr) == 0).sum())}
    with clock.stage("partition"):
        remainder = choose_remainder(graph, count, size, chosen.seed)
        rows = np.setdiff1d(np.arange(count), remainder)
        parts = len(rows) // size
        if graph is None:
            labels = random_labels(len(rows), size, chosen.seed)
        else:
            graph = graph.restrict(rows)
            labels = metis_labels(graph, parts, chosen.seed, recursive=chosen.partitioner == "metis")
            sizes = np.bincount(labels, minlength=parts)
            facts |= {"partition_size_min": int(sizes.min()), "partition_size_max": int(sizes.max())}
            if chosen.partitioner == "metis":
                labels = repair(graph, labels, parts, size, chosen.seed)
            else:
                labels = reference_repair(labels, parts, size)
    if graph is not None and chosen.refine_passes:
        from b3.mining.refine import objective, refine

        with clock.stage("refine"):
            target_of = distinct.of_row[rows]
            before = objective(graph, labels, target_of)
            labels, gains = refine(graph, labels, target_of, size, chosen.refine_passes, chosen.seed)
            facts |= {"objective_before_refinement": before, "refinement_gains": gains}
    return communities_of(labels, rows, size), remainder, facts


def _check_arrays(queries: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    queries, targets = (a if isinstance(a, np.ndarray) else np.asarray(a) for a in (queries, targets))
    for side, array in (("queries", queries), ("targets", targets)):
        if array.ndim != 2 or array.shape[1] == 0:
            raise InputError(f"{side} have shape {array.shape}; give an array of shape (N, D)")
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(f"{side} have type {array.dtype}; give float16, float32 or float64")
    if len(queries) != len(targets):
        raise InputError(f"{len(queries)} queries but {len(targets)} targets; row i of both must be one training pair")
    if queries.shape[1] != targets.shape[1]:
        raise InputError(
            f"queries have {queries.shape[1]} dimensions, targets {targets.shape[1]}; use one teacher for both"
        )
    if len(queries) == 0:
        raise InputError("there are no rows to mine (N = 0)")
    return queries, targets


def _check_rules(rules: NegativeRules | None, hard_negatives: int) -> NegativeRules:
    if rules is not None and not hard_negatives:
        raise InputError("negative_rules have no effect with hard_negatives 0; leave them out, or draw some")
    rules = rules or NegativeRules()
    rules.check()
    return rules


def _check_parameters(chosen: _Parameters, count: int, refine_passes: int, block_rows: int | None) -> None:
    least = {"p": 0, "m": 1, "K": 1, "h": 0, "seed": 0, "refine_passes": 0, "block_rows": 1}
    given = asdict(chosen) | {"refine_passes": refine_passes, "block_rows": 1 if block_rows is None else block_rows}
    names = {"K": "community_size", "h": "hard_negatives"}
    for key, low in least.items():
        value = given[key]
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
            raise InputError(f"{names.get(key, key)} is {value!r}; give an integer of at least {low}")
    if count < chosen.K:
        raise InputError(f"community_size {chosen.K} exceeds the {count} rows; give at most {count}")
    if chosen.edges not in EDGES:
        raise InputError(f"edges is {chosen.edges!r}; choose from {', '.join(EDGES)}")
    if chosen.partitioner not in PARTITIONERS:
        raise InputError(f"partitioner is {chosen.partitioner!r}; choose from {', '.join(PARTITIONERS)}")
    if chosen.partitioner == "paper" and chosen.edges != "mutual":
        raise InputError(f"partitioner paper works on mutual edges, not {chosen.edges}; leave edges out")
    if chosen.target_unit not in TARGET_UNITS:
        raise InputError(f"target_unit is {chosen.target_unit!r}; choose from {', '.join(TARGET_UNITS)}")
    if chosen.target_unit == "label30" and chosen.edges != "mutual":
        raise InputError(f"target_unit label30 works on mutual edges, not {chosen.edges}; leave edges out")
    subset = chosen.subset_rows
    if subset is not None and (isinstance(subset, bool) or not isinstance(subset, int) or subset < chosen.K):
        raise InputError(f"subset_rows is {subset!r}; give an integer of at least the community size {chosen.K}")


def _windows(chosen: _Parameters, rules: NegativeRules, num_targets: int) -> tuple[_Parameters, int, int]:
    """(parameters with the p and m that count, width of the window, width of the window of hard negatives)."""
    wanted = rules.window or chosen.m
    if chosen.target_unit == "label30":
        chosen = replace(chosen, p=0, m=label_count(num_targets))
        wanted = rules.window or 2 * chosen.h
    width = _window_width(chosen, num_targets)
    own = 1 if chosen.target_unit == "label30" else 0  # the own label has no rank there
    most = num_targets - chosen.p - own
    return chosen, min(width, most), min(wanted, most) if chosen.h else 0


def _window_width(chosen: _Parameters, num_targets: int) -> int:
    """m, clipped to the ranks that exist."""
    if num_targets < 2:
        raise InputError("all rows have the same target, so there are no negatives; mining needs two distinct targets")
    if chosen.p >= num_targets - 1:
        raise InputError(
            f"p {chosen.p} leaves no ranks: there are {num_targets} distinct targets; give at most {num_targets - 2}"
        )
    return min(chosen.m, num_targets - chosen.p)


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
