"""Export a trained model as whole weights, for transformers, sentence-transformers, vLLM and others.

    python scripts/export.py --model runs/b3 --out exported                        a run: its base and its adapter
    python scripts/export.py --model Qwen/Qwen2-VL-2B-Instruct --adapter runs/b3 --dtype float32 --out exported
    python scripts/export.py --model runs/text --format onnx --out exported        a text encoder, or heads

The adapter is merged in float32 and rounded once, so the vectors are those that the run gives. Settings that decide a
vector (prompt rule, positions, image budget, dim) travel along; --dim cuts vectors for good.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from b3 import distributed
from b3.errors import InputError, command


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or folder of a model, or of a run or other adapter")
    parser.add_argument("--adapter", help="folder or hub name of an adapter to merge")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights (default bfloat16)")
    parser.add_argument("--format", choices=("safetensors", "onnx"), default="safetensors", help="onnx is in float32")
    parser.add_argument("--dim", type=int, help="cut vectors to their first so many numbers")
    arguments = parser.parse_args(argv)
    if distributed.launched_ranks() > 1:
        raise InputError("an export is one process; start it without torchrun")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"--out {arguments.out} exists and is not empty; choose another --out or delete it")

    if arguments.format == "onnx" and arguments.dtype == "bfloat16":
        raise InputError("--dtype bfloat16 is not for --format onnx, which is in float32; leave it out")

    from b3.console import num_bytes

    settings = {} if arguments.dim is None else {"dim": arguments.dim}
    if arguments.format == "onnx":
        from b3.integrations import onnx

        what = "onnx in float32"
        onnx.export(arguments.model, arguments.adapter, arguments.out, **settings)
    else:
        from b3.model.export import export

        what = arguments.dtype or "bfloat16"
        export(arguments.model, arguments.adapter, arguments.out, what, **settings)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {what}, {num_bytes(size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
