"""What tests run on several ranks beside the programs that are delivered (`forks.Job`)."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch.distributed as dist

from b3 import distributed

Value = dict[str, Any]


def encode(arguments: list[str]) -> int:
    """Encode the golden items with the model of a folder; each rank writes the vectors that it then has."""
    from golden_data import cases, item

    from b3 import Embedder
    from b3.model.encode import Encoder

    folder, out = arguments
    distributed.start()
    gather = dist.all_gather_object

    def without_arrays(parts: list[Any], value: Any) -> None:
        assert "numpy" not in repr(pickle.dumps(value)), "vectors travel in a pickle"
        gather(parts, value)

    dist.all_gather_object = without_arrays
    model = Embedder.from_pretrained(folder, dtype="float32")
    vectors = Encoder(model, batch_tokens=256).encode([item(case) for case in cases()])
    np.save(f"{out}-{distributed.rank()}.npy", vectors)
    distributed.stop()
    return 0


def commands(arguments: list[str]) -> int:
    """Mining, training and evaluation of the recipe in ROOT, into OUT, in one process and one group."""
    import eval_mmeb
    import train
    from scripts import mine

    root, out = arguments
    recipe = [f"{root}/recipe.yaml", f"output_dir={out}/run", f"mining.dir={out}/mining"]
    evaluation = ["--model_name", f"{root}/model", "--lora", "--checkpoint_path", f"{out}/run", "--dataset_name"]
    evaluation += [f"{root}/data", "--image_dir", f"{root}/data/images.parquet", "--subset_name", "words", "pictures"]
    calls = ((mine, recipe), (train, recipe), (eval_mmeb, [*evaluation, "--encode_output_path", f"{out}/eval"]))
    stop, distributed.stop = distributed.stop, lambda: None
    codes = (program.main(given) for program, given in calls)
    failed = next((code for code in codes if code), 0)
    if not failed:
        stop()
    return failed


def gather(_: list[str]) -> int:
    """Arrays of every rank reach every rank, and one rank alone, in blocks and never pickled."""
    distributed.BLOCK_BYTES = 1000
    distributed.start()
    largest = _record_blocks()
    rank, ranks = distributed.rank(), distributed.world_size()
    everyone = list(distributed.gather_arrays(_value(rank)))
    assert len(everyone) == ranks and all(_equal(found, _value(r)) for r, found in enumerate(everyone))
    everyone[-1]["vectors"][:] = 0  # what arrives can be written to
    for owner in range(ranks):
        found = distributed.gather_arrays_to(_value(rank), owner)
        assert len(found) == (ranks if rank == owner else 0)
        assert all(_equal(part, _value(r)) for r, part in enumerate(found))
    assert ranks == 1 or 0 < max(largest) <= 1000, largest
    distributed.stop()
    return 0


def _record_blocks() -> list[int]:
    largest: list[int] = []
    for name in ("broadcast", "send", "recv"):

        def recorded(block: Any, call: Any = getattr(dist, name), **other: Any) -> Any:
            largest.append(block.numel() * block.element_size())
            return call(block, **other)

        setattr(dist, name, recorded)

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a pickled message")

    dist.all_gather_object = dist.gather_object = dist.broadcast_object_list = refused
    return largest


def _value(rank: int) -> Value:
    generator = np.random.default_rng(rank)
    vectors = generator.normal(size=(300 * rank, 7)).astype(np.float32)  # none on the first rank
    return {"vectors": vectors, "rows": [generator.integers(9, size=50 + rank), np.array([rank > 0])], "none": None}


def _equal(a: Value, b: Value) -> bool:
    pairs = zip((a["vectors"], *a["rows"]), (b["vectors"], *b["rows"]), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)
