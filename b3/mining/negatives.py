"""Hard negatives for each row, drawn from its community's shared windows (B3++; paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from b3.errors import InputError
from b3.mining.hashing import mix64, uniform
from b3.mining.rankings import Ranks
from b3.mining.vectors import DistinctTargets

SCOPES = ("community", "batch")
FILTERS = ("all", "none")
LIMIT_BLOCK = 1 << 21


@dataclass(frozen=True)
class NegativeRules:
    """What may be drawn as a hard negative, and with what probability.

    `FAITHFUL` is the released code of the authors. What stays different with it: distinct targets are counted where
    they count rows (the same where targets do not repeat), and negatives are dealt out in turns where they give the
    first h of the draw to the first member; every query meets the negatives of all rows, so the loss does not depend
    on who owns one.

    Attributes:
        scope: "community": drawn when mining, for each community; "batch": counted over all queries of a batch and
            drawn when the batch is composed, as the paper writes (`b3.mining.batch_negatives`).
        window: width of the window [p, p + window) that is counted; None: the m of the communities.
        penalty: how much one member that ranks a target above p takes from its score; 0: the paper's plain count.
        filter: "all": a query never owns a target of its own top p, its own target, or the same one twice; "none".
        drop_member_labels: never a target of any member; False: a target is left out only if no row outside the
            community carries it.
        repeat: where candidates are short, draw from several copies of the list instead of marking a shortfall.
        max_relative: a query owns only targets that score at most this share of its positive (TopK-PercPos of
            NV-Retriever, arXiv 2407.15831, where 0.95 is best). Below a negative positive by the same amount.
        max_margin: a query owns only targets that score at least this much below its positive (TopK-MarginPos, 0.05).
        candidates: most targets that are kept for each community for draws by batch, those of largest score.
    """

    scope: str = "community"
    window: int | None = None
    penalty: float = 1.0
    filter: str = "all"
    drop_member_labels: bool = True
    repeat: bool = False
    max_relative: float | None = None
    max_margin: float | None = None
    candidates: int = 512

    def check(self) -> None:
        """Raise `InputError` for a value that cannot be used, naming it and the limit."""
        if self.scope not in SCOPES:
            raise InputError(f"negatives scope is {self.scope!r}; choose from {', '.join(SCOPES)}")
        if self.filter not in FILTERS:
            raise InputError(f"negatives filter is {self.filter!r}; choose from {', '.join(FILTERS)}")
        for name, value, most in (
            ("penalty", self.penalty, math.inf),
            ("max_relative", self.max_relative, 1.0),
            ("max_margin", self.max_margin, 2.0),
        ):
            if value is not None and not (0 <= value <= most and math.isfinite(value)):
                limit = f"from 0 to {most:g}" if most < math.inf else "of at least 0"
                raise InputError(f"negatives {name} is {value!r}; give a number {limit}")
        for name, count in (("window", self.window), ("candidates", self.candidates)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise InputError(f"negatives {name} is {count!r}; give an integer of at least 1")
        if self.scope == "batch":
            limits = [n for n in ("max_relative", "max_margin") if getattr(self, n) is not None]
            if limits:
                raise InputError(
                    f"negatives {limits[0]} needs scope community: a plan for draws by batch holds no scores of queries"
                    " with candidates"
                )


FAITHFUL = NegativeRules(window=100, filter="none", drop_member_labels=False, repeat=True)


@dataclass(frozen=True)
class Scores:
    """The targets that a group of queries ranks, and what they score.

    Attributes: ids (U,) distinct targets, ascending; at (K, p + m) place in `ids` of each rank of each member; above
    (K, p + m) bool, whether that rank is above the window; scores (U,) float64, occurrences in the windows minus the
    penalty times those above.
    """

    ids: np.ndarray
    at: np.ndarray
    above: np.ndarray
    scores: np.ndarray


def narrow(ranks: Ranks, width: int) -> Ranks:
    """`ranks` with the window [p, p + width); `width` is at most the one that it has."""
    assert width <= ranks.m
    return ranks if width == ranks.m else replace(ranks, order=ranks.order[:, : ranks.p + width], m=width)


def count_scores(ranks: Ranks, members: np.ndarray, penalty: float) -> Scores:
    """Count what the `members` (K,) rank; see `Scores`."""
    order = ranks.order[members]
    ids, at = np.unique(order, return_inverse=True)
    at = at.reshape(order.shape)
    above = np.broadcast_to(np.arange(order.shape[1]) < ranks.p, order.shape)
    scores = np.bincount(at[~above], minlength=len(ids)).astype(np.float64)
    scores -= penalty * np.bincount(at[above], minlength=len(ids))
    return Scores(ids, at, above, scores)


def draw_negatives(
    ranks: Ranks,
    distinct: DistinctTargets,
    communities: np.ndarray,
    remainder: np.ndarray,
    per_query: int,
    seed: int,
    rules: NegativeRules | None = None,
    queries: np.ndarray | None = None,
) -> np.ndarray:
    """(N, h) int64 row numbers whose targets are the hard negatives; -1 where too few candidates exist.

    For each community a distinct target scores +1 for every member that ranks it in [p, p + m) and -1 (`penalty`) for
    every member that ranks it above p. Targets of members score nothing. Positive scores are drawn without
    replacement with probability proportional to the score, by the exponential keys of Efraimidis and Spirakis (2006),
    and dealt out one a member and turn; a member never gets a target of its own top p. A drawn target is given as the
    first row that carries it. The first columns of a larger h are the draw of a smaller one (unless `repeat` makes up
    for a shortage). The remainder is drawn for like a community. `rules` change this; their limits need `queries`
    (N, D) on the grid.
    """
    rules = rules or NegativeRules()
    drawn = np.full((len(ranks.own), per_query), -1, dtype=np.int64)
    groups = list(communities) + ([remainder] if len(remainder) else [])
    first_row = distinct.rows[distinct.starts[:-1]]
    for members in groups:
        targets = _draw(ranks, distinct, members, per_query, seed, rules, queries)
        drawn[members] = np.where(targets >= 0, first_row[targets], -1)
    return drawn


def _draw(
    ranks: Ranks,
    distinct: DistinctTargets,
    members: np.ndarray,
    per_query: int,
    seed: int,
    rules: NegativeRules,
    queries: np.ndarray | None = None,
) -> np.ndarray:
    """(K, h) distinct targets for one community, -1 for none."""
    counted = count_scores(ranks, members, rules.penalty)
    ids, scores = counted.ids, counted.scores
    own, carriers = np.unique(ranks.own[members], return_counts=True)
    if not rules.drop_member_labels:
        own = own[carriers == distinct.counts[own]]
    scores[np.isin(ids, own)] = 0
    banned = np.zeros((len(members), len(ids)), dtype=bool)
    if rules.filter == "all":
        banned[np.nonzero(counted.above)[0], counted.at[counted.above]] = True
        banned |= ids == ranks.own[members][:, None]
    if rules.max_relative is not None or rules.max_margin is not None:
        assert queries is not None, "limits by score need the queries"
        queue = np.flatnonzero(scores > 0)
        found = _scores_of(queries[members], distinct.vectors, ids[queue])
        banned[:, queue] |= found > _score_limit(ranks.positive[members], rules)[:, None]
    places = weighted_deal(
        scores, banned, per_query, rules, lambda copy: mix64(seed, 6, int(members[0]), ids, *([copy] if copy else []))
    )
    return np.where(places >= 0, ids[places], -1)


def _scores_of(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Exact scores (K, len(ids)) of queries (K, D) with ``vectors[ids]``, all on the grid."""
    wide = queries.astype(np.float64)
    step = max(1, LIMIT_BLOCK // queries.shape[1])
    blocks = [wide @ vectors[ids[s : s + step]].astype(np.float64).T for s in range(0, len(ids), step)]
    return np.concatenate(blocks, axis=1) if blocks else np.empty((len(queries), 0))


def _score_limit(positive: np.ndarray, rules: NegativeRules) -> np.ndarray:
    """(K,) the largest score that a negative of each query may have."""
    limit = np.full(len(positive), np.inf)
    if rules.max_relative is not None:
        limit = positive - (1 - rules.max_relative) * np.abs(positive)
    if rules.max_margin is not None:
        limit = np.minimum(limit, positive - rules.max_margin)
    return limit


def weighted_deal(
    scores: np.ndarray,
    banned: np.ndarray,
    per_query: int,
    rules: NegativeRules,
    hashes: Callable[[int], np.ndarray],
) -> np.ndarray:
    """Draw without replacement by score and deal out, one a query and turn: (K, h) places in `scores`, -1 for none.

    Args:
        scores: (U,) what is not above 0 is never drawn.
        banned: (K, U) what a query may not own.
        hashes: the random numbers, (U,) uint64, of each copy 0, 1, ... of the candidates.
    """
    queries = len(banned)
    wanted = queries * per_query
    usable = np.flatnonzero(scores > 0)
    copies = -(-wanted // len(usable)) if rules.repeat and len(usable) else 1
    keys = [-np.log(uniform(hashes(copy)))[usable] / np.maximum(scores[usable], 1e-9) for copy in range(copies)]
    queue = np.tile(usable, copies)[np.argsort(np.concatenate(keys), kind="stable")]
    dealt = np.full(wanted, -1, dtype=np.int64)
    head = queue[:wanted]
    once = copies > 1 and rules.filter == "all"
    if once or banned[np.arange(len(head)) % max(1, queries), head].any():
        head = _deal(queue, banned, wanted, once)
    dealt[: len(head)] = head
    return dealt.reshape(per_query, queries).T


def _deal(queue: np.ndarray, banned: np.ndarray, wanted: int, once: bool) -> np.ndarray:
    """Give each query in turn the first candidate left that it may have; -1 where there is none.

    `once`: no query gets a candidate twice.
    """
    banned = banned.copy() if once else banned
    dealt = np.full(wanted, -1, dtype=np.int64)
    passed: list[int] = []  # left over by the queries before, in order
    ahead = iter(queue.tolist())
    for turn in range(wanted):
        refused = banned[turn % len(banned)]
        place = next((i for i, candidate in enumerate(passed) if not refused[candidate]), None)
        if place is not None:
            dealt[turn] = passed.pop(place)
        else:
            for candidate in ahead:
                if not refused[candidate]:
                    dealt[turn] = candidate
                    break
                passed.append(candidate)
        if once and dealt[turn] >= 0:
            refused[dealt[turn]] = True
    return dealt
