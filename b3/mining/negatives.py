"""Hard negatives for each row, drawn from its community's shared windows (B3++; paper, section 3.3)."""

from __future__ import annotations

import numpy as np

from b3.mining.rankings import Rankings
from b3.mining.vectors import DistinctTargets, mix64, uniform

AUTHORS_WINDOW = 100  # ranks [p, p + 100) count in the authors' code, whatever m is


def draw_negatives(
    rankings: Rankings,
    distinct: DistinctTargets,
    communities: np.ndarray,
    remainder: np.ndarray,
    per_query: int,
    seed: int,
    as_authors: bool = False,
) -> np.ndarray:
    """(N, h) int64 row numbers whose targets are the hard negatives; -1 where too few candidates exist.

    For each community a distinct target scores +1 for every member that ranks it in [p, p + m) and -1 for every member
    that ranks it above p. Targets of members score nothing. Positive scores are drawn without replacement with
    probability proportional to the score, by the exponential keys of Efraimidis and Spirakis (2006), and dealt out one
    per member and turn; a member never gets a target of its own top p. A drawn target is given as the first row that
    carries it. The first columns of a larger h are the draw of a smaller one. The remainder counts as a community.

    as_authors: as the authors' code (preset paper). A member may get any target that was drawn; a target of a member
        is left out only if no row outside the community carries it; where candidates are short, they are drawn from
        several copies of the list. What stays different: distinct targets are counted where they count rows (the same
        where targets do not repeat), and negatives are dealt out in turns where they give the first h of the draw to
        the first member; every query meets the negatives of all rows, so the loss does not depend on who owns one.
    """
    negatives = np.full((len(rankings), per_query), -1, dtype=np.int64)
    groups = [*communities, *([remainder] if len(remainder) else [])]
    first_row = distinct.rows[distinct.starts[:-1]]
    for members in groups:
        targets = _draw(rankings, distinct, members, per_query, seed, as_authors)
        negatives[members] = np.where(targets >= 0, first_row[targets], -1)
    return negatives


def _draw(
    rankings: Rankings,
    distinct: DistinctTargets,
    members: np.ndarray,
    per_query: int,
    seed: int,
    as_authors: bool,
) -> np.ndarray:
    """(K, h) distinct targets for one community of `members` (K,), -1 for none."""
    order = rankings.order[members]  # (K, p + m)
    # U candidates: all that the members rank, window and above; `place` (K, p + m) finds them in `candidate_ids`
    candidate_ids, place = np.unique(order, return_inverse=True)
    place = place.reshape(order.shape)
    num_candidates = len(candidate_ids)
    scores = np.bincount(place[:, rankings.p :].ravel(), minlength=num_candidates).astype(np.float64)
    scores -= np.bincount(place[:, : rankings.p].ravel(), minlength=num_candidates)
    member_targets, num_carriers = np.unique(rankings.target_ids[members], return_counts=True)
    if as_authors:  # only those that no row outside the community carries
        member_targets = member_targets[num_carriers == distinct.counts[member_targets]]
    scores[np.isin(candidate_ids, member_targets)] = 0

    num_places = len(members) * per_query
    usable = np.flatnonzero(scores > 0)
    num_copies = -(-num_places // len(usable)) if as_authors and len(usable) else 1
    keys = []
    for copy in range(num_copies):
        # the smallest of these exponential keys are a draw without replacement, weighted by score
        hashes = mix64(seed, 6, int(members[0]), candidate_ids, *([copy] if copy else []))
        keys.append(-np.log(uniform(hashes))[usable] / np.maximum(scores[usable], 1e-9))
    # all copies in one line, smallest key first; `usable` are places in `candidate_ids`
    queue = np.tile(usable, num_copies)[np.argsort(np.concatenate(keys), kind="stable")]
    if as_authors:
        dealt = np.full(num_places, -1, dtype=np.int64)
        dealt[: len(queue)] = queue[:num_places]
    else:
        is_banned = np.zeros((len(members), num_candidates), dtype=bool)  # a member's own top p
        np.put_along_axis(is_banned, place[:, : rankings.p], True, axis=1)
        dealt = _deal(queue, is_banned, num_places)
    # dealt turn by turn: one row per turn, one column per member
    by_member = dealt.reshape(per_query, len(members)).T
    return np.where(by_member >= 0, candidate_ids[by_member], -1)


def _deal(queue: np.ndarray, is_banned: np.ndarray, num_places: int) -> np.ndarray:
    """(num_places,) candidates of the queue: each query in turn takes the first one left that it may have; -1: none.

    Args:
        queue: (U',) candidates in the order of the draw.
        is_banned: (K, U) what a query may not have.
    """
    dealt = np.full(num_places, -1, dtype=np.int64)
    head = queue[:num_places]
    if not is_banned[np.arange(len(head)) % max(1, len(is_banned)), head].any():
        dealt[: len(head)] = head  # nobody has to pass anything on
        return dealt
    leftovers: list[int] = []  # of the queries before, in order
    ahead = iter(queue.tolist())
    for turn in range(num_places):
        refused = is_banned[turn % len(is_banned)]
        place = next((i for i, candidate in enumerate(leftovers) if not refused[candidate]), None)
        if place is not None:
            dealt[turn] = leftovers.pop(place)
            continue
        for candidate in ahead:
            if not refused[candidate]:
                dealt[turn] = candidate
                break
            leftovers.append(candidate)
    return dealt
