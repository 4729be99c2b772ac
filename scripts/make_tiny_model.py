"""Write a tiny random Qwen2-VL: a checkpoint folder with a tokenizer trained on a recipe's texts.

python scripts/make_tiny_model.py configs/demo.yaml --out runs/tiny
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from b3.config import load_config
from b3.errors import command


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--hidden", type=int, default=128, help="width (default 128)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument("--vision-layers", type=int, default=2, help="layers of the vision tower (default 2)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="size of the tokenizer (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    from b3.data.datasets import load_datasets, texts_of
    from b3.model.backbones.tiny import make_tiny_model

    make_tiny_model(
        arguments.out,
        texts_of(load_datasets(load_config(arguments.config))),
        hidden=arguments.hidden,
        layers=arguments.layers,
        vision_layers=arguments.vision_layers,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
    )
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
