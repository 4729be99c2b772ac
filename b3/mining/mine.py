"""Mine batches: from teacher embeddings to a batch plan, in six steps."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
from pydantic import ValidationError

from b3 import distributed
from b3.config.schema import MiningOptions
from b3.console import Clock, Progress, peak_memory
from b3.errors import InputError
from b3.files import Stages
from b3.mining.communities import find_communities
from b3.mining.graph import Problem
from b3.mining.negatives import AUTHORS_WINDOW, draw_negatives
from b3.mining.plan import BatchPlan
from b3.mining.rankings import Rankings, join_rankings, label_count, rank_labels, rank_targets, search_recall
from b3.mining.report import make_report
from b3.mining.vectors import Pairs, check_arrays, normalise


def mine(
    queries: np.ndarray,
    targets: np.ndarray,
    p: int = 30,
    m: int = 100,
    community_size: int = 32,
    hard_negatives: int = 5,
    seed: int = 0,
    *,
    data_fingerprint: str | None = None,
    teacher: str | None = None,
    compare: bool = False,
    progress: Progress | None = None,
    stages: Stages | None = None,
    device: str | None = None,
    block_rows: int | None = None,
    **options: Any,
) -> BatchPlan:
    """Group the rows of a data set into communities of hard negatives of each other.

    For every query, all distinct targets of the data set are ranked by cosine similarity (its own one included; equal
    target rows count once). Targets at ranks [p, p + m) are its hard negatives: above p they are likely to be right,
    below p + m they are easy. Rows are joined in a graph by that relation and the graph is cut into communities of
    exactly K rows ("Breaking the Batch Barrier", arXiv 2505.11293, section 3). The result depends on the arrays, on
    p to `seed` and on `options` alone.

    Args:
        queries, targets: (N, D) teacher embeddings, row i of both being a training pair; float16, 32 or 64, any
            memory order, also memory-mapped; need not be normalised.
        p: ranks skipped at the top.
        m: width of the window; clipped where fewer than p + m distinct targets exist (``report["window"]`` says so).
        community_size: K.
        hard_negatives: h, hard negatives drawn for each row (0: none).
        seed: of all random choices.
        options: the other fields of `b3.config.schema.MiningOptions`, which explains them: edges, veto,
            partitioner, refine_passes, piece_rows, search, preset, classification.
        data_fingerprint, teacher: recorded in the manifest.
        compare: also measure the paper's recipe on the same rows, for the report.
        progress: called as ``progress(stage, done, total)``.
        stages: where finished stages are kept for an interrupted call to continue from.
        device: torch device for ranking large inputs; default: a GPU if there is one.
        block_rows: queries ranked at a time; a matter of memory only.

    Raises:
        InputError: for arrays or parameters that cannot be used, naming the value and the limit.

    Example:
        >>> plan = mine(queries, targets, p=30, m=100, community_size=32, hard_negatives=5)
        >>> plan.communities.shape
        (3125, 32)
    """
    values = {"p": p, "m": m, "community_size": community_size, "hard_negatives": hard_negatives, "seed": seed}
    parameters = mining_options(**values, **options)
    clock = Clock(progress)
    facts: dict[str, Any] = {"search": parameters.search}

    # 1. Normalise: unit vectors on a grid on which sums are exact, and which targets are equal.
    with clock.stage("normalise"):
        pairs = normalise(*check_arrays(queries, targets))
        parameters = _for_targets(parameters, len(pairs), len(pairs.distinct))

    # 2. Rank all distinct targets for every query, as deep as the window of communities or of negatives needs.
    with clock.stage("rank"):
        wide = _stored_rankings(pairs, parameters, stages)
        if wide is None:
            wide = _rank(pairs, parameters, clock.progress, device=device, block_rows=block_rows)
            if stages:
                stages.save("rankings", _rankings_key(pairs, parameters), wide.arrays)
    if parameters.search != "exact":
        with clock.stage("recall"):
            facts["search_recall"] = search_recall(pairs.queries, wide, pairs.distinct)
    width, negatives_width = _widths(parameters, len(pairs.distinct))
    rankings = wide.narrow(width)

    # 3. Graph: rows that are hard negatives of each other are linked. The problem builds it when the miner asks for it.
    problem = Problem(pairs.queries, rankings, pairs.distinct, np.arange(len(pairs)), parameters, clock)

    # 4. Communities of exactly K rows that hold as much of the graph as possible.
    communities, remainder = _communities(problem, _rankings_key(pairs, parameters), stages)

    # 5. Negatives: further hard negatives for each row, from what its community ranks.
    negatives = None
    if parameters.hard_negatives:
        with clock.stage("negatives"):
            negatives = draw_negatives(
                wide.narrow(negatives_width), pairs.distinct, communities, remainder, parameters.hard_negatives,
                parameters.seed, as_authors=parameters.preset == "paper",
            )  # fmt: skip
            facts["hard_negatives_missing"] = int((negatives < 0).sum())

    # 6. Report: what the plan is worth.
    with clock.stage("report"):
        report = make_report(problem, communities, compare)
    report |= {**facts, **problem.facts, "seconds": clock.seconds, "peak_memory_bytes": peak_memory()}
    manifest = {
        "data_fingerprint": data_fingerprint,
        "embeddings_fingerprint": pairs.fingerprint,
        "teacher": teacher,
        "N": len(pairs),
        "D": pairs.queries.shape[1],
        **parameters.model_dump(),
        "versions": _versions(),
        "seconds": round(sum(clock.seconds.values()), 3),
    }
    return BatchPlan(communities, remainder, negatives, report, manifest)


def rank_together(
    queries: np.ndarray,
    targets: np.ndarray,
    options: MiningOptions,
    stages: Stages,
    owner: int,
    progress: Progress | None = None,
) -> None:
    """Step 2 of `mine` by all processes, each for an equal part of the rows.

    Process `owner` keeps the whole in `stages`, from which its `mine` continues. All call this with the same arguments.
    """
    pairs = normalise(*check_arrays(queries, targets))
    options = _for_targets(options, len(pairs), len(pairs.distinct))
    is_owner = distributed.rank() == owner
    if any(distributed.gather_objects(is_owner and _stored_rankings(pairs, options, stages) is not None)):
        return
    part = _rank(pairs, options, progress, share=(distributed.rank(), distributed.world_size()))
    parts = distributed.gather_arrays_to(part, owner)
    if parts:
        stages.save("rankings", _rankings_key(pairs, options), join_rankings(parts).arrays)


def _rank(pairs: Pairs, options: MiningOptions, progress: Progress | None, **how: Any) -> Rankings:
    """Rankings of all queries (or of a `share`), with the wider of the two windows."""
    how |= {"progress": progress, "method": options.search}
    width, terms = max(_widths(options, len(pairs.distinct))), options.community_size - 1
    if options.by_label:
        return rank_labels(pairs.queries, pairs.distinct, width, terms, **how)
    return rank_targets(pairs.queries, pairs.distinct, options.p, width, terms, **how)


def _stored_rankings(pairs: Pairs, options: MiningOptions, stages: Stages | None) -> Rankings | None:
    arrays = stages.load("rankings", _rankings_key(pairs, options)) if stages else None
    if arrays is None:
        return None
    width = arrays["order"].shape[1] - options.p
    return Rankings(p=options.p, m=width, **arrays)


def _rankings_key(pairs: Pairs, options: MiningOptions) -> str:
    return Stages.key(
        embeddings=pairs.fingerprint,
        width=max(_widths(options, len(pairs.distinct))),
        fields=list(Rankings.__annotations__),
        **options.model_dump(include={"p", "community_size", "search", "preset", "classification"}),
    )


def _communities(problem: Problem, rankings_key: str, stages: Stages | None) -> tuple[np.ndarray, np.ndarray]:
    """`find_communities`, or what an interrupted call has kept of it in `stages`."""
    key = Stages.key(rankings=rankings_key, **problem.options.model_dump())
    arrays = stages.load("communities", key) if stages else None
    if arrays is not None:
        problem.facts |= json.loads(str(arrays["facts"]))
        return arrays["communities"], arrays["remainder"]
    communities, remainder = find_communities(problem)
    if stages:
        arrays = {"communities": communities, "remainder": remainder}
        stages.save("communities", key, {**arrays, "facts": np.asarray(json.dumps(problem.facts))})
    return communities, remainder


def _widths(options: MiningOptions, num_targets: int) -> tuple[int, int]:
    """Width of the window of communities and of that of hard negatives, clipped to the ranks that exist."""
    most = num_targets - options.p - (1 if options.by_label else 0)  # the own label has no rank there
    negatives = AUTHORS_WINDOW if options.preset == "paper" else options.m
    return min(options.m, most), min(negatives, most) if options.hard_negatives else 0


def _for_targets(options: MiningOptions, num_rows: int, num_targets: int) -> MiningOptions:
    """The options with the p and m that count. Raises `InputError` where they do not fit the data."""
    if num_rows < options.community_size:
        raise InputError(
            f"community_size {options.community_size} exceeds the {num_rows} rows; give at most {num_rows}"
        )
    if num_targets < 2:
        raise InputError("all rows have the same target, so there are no negatives; mining needs two distinct targets")
    if options.by_label:
        return options.model_copy(update={"p": 0, "m": label_count(num_targets)})
    if options.p >= num_targets - 1:
        raise InputError(
            f"p {options.p} leaves no ranks: there are {num_targets} distinct targets; give at most {num_targets - 2}"
        )
    return options


def mining_options(**values: Any) -> MiningOptions:
    """The options of `mine`. Raises `InputError`, one line, for a value that cannot be used."""
    try:
        return MiningOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        raise InputError(f"mine has no option '{name}'; it has {', '.join(MiningOptions.model_fields)}")
    if first["type"] == "value_error":
        raise InputError(first["msg"].removeprefix("Value error, "))
    raise InputError(f"{name} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from b3 import __version__

    versions = {"b3": __version__}
    for name in ("numpy", "scipy", "pymetis", "numba", "torch"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
