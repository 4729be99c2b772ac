"""Cut the rows into communities of exactly K, in one piece or in pieces of similar rows."""

from __future__ import annotations

import numpy as np

from b3 import registry
from b3.mining.graph import Problem, kept_rows, merge_facts


def find_communities(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(communities (C, K) int64, remainder (R,) int64): the miner of `mining.partitioner` cuts all rows of the problem.

    Members ascend within a community, communities by their first member; `problem.facts` gets what the report says.
    """
    options = problem.options
    if options.piece_rows is not None and len(problem) > options.piece_rows:
        community_of = _cut_in_pieces(problem, options.piece_rows)
    else:
        community_of = registry.load("miner", options.partitioner)(problem, options, problem.clock)
    is_member = community_of >= 0
    communities = members_of(community_of[is_member], problem.rows[is_member], options.community_size)
    return communities, problem.rows[~is_member]


def _cut_in_pieces(problem: Problem, piece_rows: int) -> np.ndarray:
    """(n,) community of each row, -1 for none: balanced k-means makes pieces, and the miner cuts them one by one."""
    from b3.mining.miners.kmeans import balanced_kmeans, pair_vectors

    options = problem.options
    cut = registry.load("miner", options.partitioner)
    positions = kept_rows(None, len(problem), options.community_size, options.seed)
    with problem.clock.stage("pieces"):
        num_pieces = -(-len(positions) // piece_rows)
        vectors = pair_vectors(problem.queries, problem.distinct)
        piece_of = balanced_kmeans(vectors, problem.rows[positions], num_pieces, options.community_size, options.seed)
    community_of = np.full(len(problem), -1, dtype=np.int64)
    facts, num_communities = [], 0
    for number in range(num_pieces):
        members = positions[piece_of == number]  # a multiple of K, so that the miner leaves none out
        piece = problem.part(members)
        community_of[members] = num_communities + cut(piece, options, problem.clock)
        num_communities += len(members) // options.community_size
        facts.append(piece.facts)
    problem.facts |= {"pieces": num_pieces, **merge_facts(facts)}
    return community_of


def members_of(community_of: np.ndarray, rows: np.ndarray, community_size: int) -> np.ndarray:
    """(C, K) int64: the `rows` (n,), ascending, of each community; communities in the order of their first member."""
    order = np.argsort(community_of, kind="stable")
    sizes = np.bincount(community_of)
    assert (sizes == community_size).all(), f"communities of {sizes.min()} to {sizes.max()} rows, not {community_size}"
    members = rows[order].reshape(-1, community_size)
    return np.ascontiguousarray(members[np.argsort(members[:, 0], kind="stable")])
