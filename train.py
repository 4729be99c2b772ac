"""Train an embedding model from a recipe.

    python train.py configs/demo.yaml                            one process
    python train.py configs/demo.yaml train.steps=20             with overrides
    torchrun --nproc_per_node=8 train.py configs/b3_qwen2vl_2b.yaml
    python train.py configs/b3_qwen2vl_2b.yaml --debug           its miniature: three steps on any machine

Mine a batch plan first: python scripts/mine.py CONFIG.yaml. The same command continues an interrupted run. On SIGTERM
or SIGUSR1 the run finishes its step, saves and exits with code 85. A mistake in the input is one line on stderr and
exit code 2.
"""

from __future__ import annotations

import argparse
from functools import partial

from b3.config import describe_keys, load_config
from b3.errors import EXIT_STOPPED, command


@partial(command, memory="lower train.chunk_tokens, or set model.gradient_checkpointing=true")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="keys:\n" + describe_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of it")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="a tiny model, the embedded data and three steps under the recipe's settings, into OUTPUT_DIR-debug",
    )
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)

    from b3 import distributed
    from b3.train.run import train

    if arguments.debug:
        from b3.train.debug import prepare

        config = prepare(config)
    result = train(config)
    distributed.stop()
    if result.already_complete:
        print(f"{result.folder} is complete; nothing to do")
    elif not result.stopped and distributed.is_first():
        print(f"done: weights, README.md and report.html are in {result.folder}")
    if result.stopped:
        print(f"stopped as asked; {result.folder} is saved, the same command continues", flush=True)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    from b3 import distributed

    distributed.leave(main())
