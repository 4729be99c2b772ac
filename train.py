"""Train an embedding model from a recipe.

    python train.py configs/demo.yaml                            one process
    python train.py configs/demo.yaml train.steps=20             with overrides
    torchrun --nproc_per_node=8 train.py configs/b3_qwen2vl_2b.yaml

A batch plan is mined first: python scripts/mine.py CONFIG.yaml. An interrupted run continues when the same command is
given again. Exit code 2 and one line on stderr for a mistake in the input.
"""

from __future__ import annotations

import argparse
import sys

from b3.config import describe_keys, load_config
from b3.errors import command


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="keys:\n" + describe_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of it")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)

    from b3 import distributed
    from b3.train.run import train

    try:
        result = train(config)
    finally:
        distributed.stop()
    if result.already_complete:
        print(f"{result.folder} is complete; nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
