"""Arrays go from rank to rank in blocks of bounded size and arrive as the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_python

SCRIPT = """
import numpy as np
import torch.distributed as dist
from b3 import distributed
distributed.BLOCK_BYTES = 1000
distributed.start()
largest = []
for name in ("broadcast", "send", "recv"):
    def recorded(block, call=getattr(dist, name), **other):
        largest.append(block.numel() * block.element_size())
        return call(block, **other)
    setattr(dist, name, recorded)
def refused(*arguments, **options):
    raise AssertionError("a pickled message")
dist.all_gather_object = dist.gather_object = dist.broadcast_object_list = refused
def value(rank):
    generator = np.random.default_rng(rank)
    vectors = generator.normal(size=(300 * rank, 7)).astype(np.float32)  # none on the first rank
    return {"vectors": vectors, "rows": [generator.integers(9, size=50 + rank), np.array([rank > 0])], "none": None}
def equal(a, b):
    pairs = zip((a["vectors"], *a["rows"]), (b["vectors"], *b["rows"]), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)
rank, ranks = distributed.rank(), distributed.world_size()
everyone = list(distributed.gather_arrays(value(rank)))
assert len(everyone) == ranks and all(equal(found, value(r)) for r, found in enumerate(everyone))
everyone[-1]["vectors"][:] = 0  # what arrives can be written to
for owner in range(ranks):
    found = distributed.gather_arrays_to(value(rank), owner)
    assert len(found) == (ranks if rank == owner else 0) and all(equal(part, value(r)) for r, part in enumerate(found))
assert ranks == 1 or 0 < max(largest) <= 1000, largest
distributed.stop()
print("rank", rank, "done")
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_arrays_are_gathered_in_blocks(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert run_python(tmp_path / "script.py", ranks=ranks).stdout.count("done") == ranks
