"""Mine batch plans.

    python scripts/mine.py CONFIG.yaml [section.key=value ...]          every data set of a recipe
    python scripts/mine.py --queries q.npy --targets t.npy -p 30 -m 100 -k 32 --hard-negatives 5 --seed 0 --out DIR

Several processes share encoding and ranking: torchrun --nproc_per_node=8 scripts/mine.py CONFIG.yaml. An interrupted
call continues after the last finished stage. A plan directory holds communities.npy, remainder.npy, hard_negatives.npy,
manifest.json, report.json and report.html.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from b3.config.schema import MiningOptions
from b3.errors import ConfigError, command

if TYPE_CHECKING:
    import numpy as np

WAIT_MINUTES = 24 * 60.0  # ranks without a data set to cut wait for those that have one
FLAGS = {"p": ["-p"], "m": ["-m"], "community_size": ["-k", "--community-size"]}  # where not --like-the-name


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="a recipe; mines all its data sets")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of the recipe")
    arrays = parser.add_argument_group("arrays instead of a recipe")
    arrays.add_argument("--queries", type=Path, help="(N, D) .npy of teacher query embeddings")
    arrays.add_argument("--targets", type=Path, help="(N, D) .npy of teacher target embeddings")
    arrays.add_argument("--out", type=Path, help="plan directory to write")
    arrays.add_argument("--device", help="torch device for ranking (default: a GPU if there is one)")
    arrays.add_argument("--compare", action="store_true", help="also measure the paper's recipe (needs pymetis)")
    for name, field in MiningOptions.model_fields.items():
        flags = FLAGS.get(name, [f"--{name.replace('_', '-')}"])
        default = 0 if name == "hard_negatives" else field.default
        text = f"{field.description} (default {default})"
        if field.annotation is bool:
            arrays.add_argument(
                *flags, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            arrays.add_argument(*flags, dest=name, type=yaml.safe_load, default=argparse.SUPPRESS, help=text)
    return parser


def mine_arrays(arguments: argparse.Namespace) -> None:
    from b3.files import Stages, tidy
    from b3.locks import alone
    from b3.mining import mine
    from b3.mining.plan import describe_plans
    from b3.mining.recipe import stage_bar
    from b3.mining.teacher import load_matrix

    missing = [f"--{name}" for name in ("queries", "targets", "out") if getattr(arguments, name) is None]
    if missing:
        raise ConfigError(f"give a recipe, or all of --queries, --targets and --out (missing: {', '.join(missing)})")
    queries, targets = load_matrix(arguments.queries), load_matrix(arguments.targets)
    given = {name: value for name, value in vars(arguments).items() if name in MiningOptions.model_fields}
    options = {"hard_negatives": 0, **given}
    stages = Stages(arguments.out.parent / f".{arguments.out.name}.stages")
    if (arguments.out / "manifest.json").exists():
        stages.remove()  # a kill may have left them beside the finished plan
        check_plan(arguments.out, queries, targets, options)
        print(f"{arguments.out} holds this batch plan already; nothing to do")
        return
    held = alone(arguments.out, "call of mining", "choose another --out")
    with held, stage_bar("mine", show=True) as progress:
        tidy(arguments.out)
        tidy(stages.folder)
        plan = mine(
            queries,
            targets,
            **options,
            device=arguments.device,
            compare=arguments.compare,
            progress=progress,
            stages=stages,
        )
        plan.save(arguments.out)
        stages.remove()
    print(describe_plans({str(arguments.out): plan}))


def check_plan(folder: Path, queries: np.ndarray, targets: np.ndarray, options: dict[str, Any]) -> None:
    """Raise `InputError` if the plan in `folder` is torn, or was mined from other arrays or with other options."""
    from b3.files import claim
    from b3.mining.mine import mining_options
    from b3.mining.plan import BatchPlan
    from b3.mining.vectors import check_arrays, normalise

    parameters = mining_options(**options)
    facts = parameters.model_dump() | {"embeddings_fingerprint": normalise(*check_arrays(queries, targets)).fingerprint}
    by_label = ("p", "m") if parameters.by_label else ()  # those follow from the number of labels
    claim(folder, facts, "batch plan", "choose another --out or delete it", ignore=by_label)
    BatchPlan.load(folder)


@partial(command, memory="lower mining.batch_tokens or model.max_pixels for encoding; for ranking give --device cpu")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.config is None:
        mine_arrays(arguments)
        return 0
    if arguments.queries or arguments.targets or arguments.out:
        raise ConfigError("give either a recipe or --queries, --targets and --out, not both")
    from b3 import distributed
    from b3.config import load_config
    from b3.mining.plan import describe_plans
    from b3.mining.recipe import mine_recipe

    config = load_config(arguments.config, arguments.overrides)
    distributed.start(WAIT_MINUTES)
    plans = mine_recipe(config, show_progress=True)
    distributed.stop()
    if distributed.is_first():
        print(describe_plans(plans))
        if any(plan.measured for plan in plans.values()):
            print(f"report: {Path(config.mining.dir) / 'report.html'}")
    return 0


if __name__ == "__main__":
    from b3 import distributed

    distributed.leave(main())
