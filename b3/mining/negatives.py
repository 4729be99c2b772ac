"""Hard negatives for each row, drawn from its community's shared windows (B3++; paper, section 3.3)."""

from __future__ import annotations

import numpy as np

from b3.mining.hashing import mix64, uniform
from b3.mining.rank import Ranks
from b3.mining.vectors import DistinctTargets


def draw_negatives(
    ranks: Ranks,
    distinct: DistinctTargets,
    communities: np.ndarray,
    remainder: np.ndarray,
    per_query: int,
    seed: int,
) -> np.ndarray:
    """(N, h) int64 row numbers whose targets are the hard negatives; -1 where too few candidates exist.

    For each community a distinct target scores +1 for every member that ranks it in [p, p + m) and -1 for every member
    that ranks it above p. Targets of members score nothing. Positive scores are drawn without replacement with
    probability proportional to the score, by the exponential keys of Efraimidis and Spirakis (2006), and dealt out one
    a member and turn; a member never gets a target of its own top p. A drawn target is given as the first row that
    carries it. The first columns of a larger h are the draw of a smaller one. The remainder is drawn for like a
    community.
    """
    drawn = np.full((len(ranks.own), per_query), -1, dtype=np.int64)
    groups = list(communities) + ([remainder] if len(remainder) else [])
    first_row = distinct.rows[distinct.starts[:-1]]
    for members in groups:
        targets = _draw(ranks, members, per_query, seed)
        drawn[members] = np.where(targets >= 0, first_row[targets], -1)
    return drawn


def _draw(ranks: Ranks, members: np.ndarray, per_query: int, seed: int) -> np.ndarray:
    """(K, h) distinct targets for one community, -1 for none."""
    order = ranks.order[members]
    ids, at = np.unique(order, return_inverse=True)
    at = at.reshape(order.shape)
    scores = np.bincount(at[:, ranks.p :].ravel(), minlength=len(ids))
    scores -= np.bincount(at[:, : ranks.p].ravel(), minlength=len(ids))
    scores[np.isin(ids, ranks.own[members])] = 0
    keys = -np.log(uniform(mix64(seed, 6, int(members[0]), ids))) / np.maximum(scores, 1e-9)
    queue = np.flatnonzero(scores > 0)
    queue = queue[np.argsort(keys[queue], kind="stable")]
    banned = np.zeros((len(members), len(ids)), dtype=bool)
    np.put_along_axis(banned, at[:, : ranks.p], True, axis=1)
    wanted = len(members) * per_query
    dealt = np.full(wanted, -1, dtype=np.int64)
    head = queue[:wanted]
    if banned[np.arange(len(head)) % len(members), head].any():
        head = _deal(queue, banned, wanted)
    dealt[: len(head)] = head
    return np.where(dealt >= 0, ids[dealt], -1).reshape(per_query, len(members)).T


def _deal(queue: np.ndarray, banned: np.ndarray, wanted: int) -> np.ndarray:
    """Give each member in turn the first candidate left that it may have; -1 where there is none."""
    left = np.ones(len(queue), dtype=bool)
    dealt = np.full(wanted, -1, dtype=np.int64)
    start = 0
    for turn in range(wanted):
        while start < len(queue) and not left[start]:
            start += 1
        usable = left[start:] & ~banned[turn % len(banned), queue[start:]]
        place = int(usable.argmax()) if usable.size else 0
        if usable.size and usable[place]:
            dealt[turn] = queue[start + place]
            left[start + place] = False
    return dealt
