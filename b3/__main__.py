"""The command `b3`: one program for all of them.

    b3 mine CONFIG.yaml        batch plans of a recipe, or of arrays
    b3 train CONFIG.yaml       train a recipe
    b3 train --pairs FILE      your own pairs: a recipe, mining, training, scores, an index
    b3 eval --model_name ...   score a model on a benchmark
    b3 embed --model ...       vectors of your own rows
    b3 search --index ...      search them
    b3 export --model ...      whole weights for other software
    b3 --version

`b3 COMMAND --help` explains each. They are the programs of the repository (train.py, eval_mmeb.py, scripts/), so b3
must be installed from it with `pip install -e .`. On several ranks: torchrun --nproc_per_node=8 -m b3 train ...
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import b3
from b3.errors import InputError, command

PROGRAMS = {
    "mine": "scripts.mine",
    "train": "train",
    "eval": "eval_mmeb",
    "embed": "scripts.embed",
    "search": "scripts.search",
    "export": "scripts.export",
}


def versions() -> str:
    """b3 and what its numbers depend on, on one line."""
    parts = [f"b3 {b3.__version__}"]
    for package in ("torch", "transformers", "peft", "numpy"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} missing")
    return ", ".join([*parts, f"Python {sys.version.split()[0]}"])


@command
def main(argv: list[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if name in ("-V", "--version"):
        print(versions())
        return 0
    if name not in PROGRAMS:
        raise InputError(f"there is no command 'b3 {name}'; choose from {', '.join(PROGRAMS)}")
    root = Path(__file__).resolve().parents[1]
    if not (root / "train.py").is_file():
        raise InputError(f"the programs are not beside {root / 'b3'}; clone the repository and pip install -e . there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    sys.argv[0] = f"b3 {name}"  # how the program calls itself in its usage
    is_own = name == "train" and any(one.partition("=")[0] == "--pairs" for one in rest)
    code: int = importlib.import_module("scripts.own_data" if is_own else PROGRAMS[name]).main(rest)
    return code


def run() -> None:
    """The entry point: as every program, it leaves without waiting for other ranks."""
    from b3 import distributed

    distributed.leave(main())


if __name__ == "__main__":
    run()
