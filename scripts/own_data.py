"""Your own pairs in one command: a recipe, mining, training, scores on a held-out part, an index to search.

    b3 train --pairs pairs.jsonl --images DIR --out runs/own
    b3 train --pairs pairs.jsonl --out runs/own --recipe-only       write the recipe and stop

A row of the jsonl file is a query with its right answer; docs/data.md shows the formats. A tenth is held out. Teacher,
window, community and steps follow from the number of rows: they are printed and written to OUT/recipe.yaml, which you
may change; the same command then continues with your recipe. On several GPUs take --recipe-only, then
torchrun --nproc_per_node=8 -m b3 mine OUT/recipe.yaml, and so on with train.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from b3.config import Config, load_config
from b3.errors import EXIT_STOPPED, InputError, command
from b3.files import write_text


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def evaluate(config: Config, name: str, model: str, adapter: str | None) -> dict[str, Any]:
    from b3.eval.run import EvalSpec
    from b3.eval.run import evaluate as run
    from b3.model.embedder import locate
    from b3.model.settings import resolve_settings

    assert config.eval is not None
    base, folder = locate(model, adapter)
    spec = EvalSpec(
        model=model,
        adapter=adapter,
        source=config.eval.source,
        image_dir=config.eval.image_dir,
        dtype=config.model.dtype if config.model.dtype != "auto" else "float32",
        settings=resolve_settings(model, config.model.settings(), folder, base),
    )
    return run(spec, config.eval.subsets, Path(config.output_dir).parent / "eval" / name, progress=True)


def index(config: Config, out: Path, model: str, adapter: str | None) -> Path:
    """Embed the distinct targets of all rows, so that they can be searched; returns the folder."""
    import pyarrow.parquet as pq

    from scripts.embed import main as embed

    rows: dict[tuple[str, str], None] = {}
    training = pq.read_table(out / "data" / "train.parquet", columns=["pos_text", "pos_image_path"])
    held_out = pq.read_table(out / "data" / "held_out.parquet", columns=["tgt_text", "tgt_img_path"])
    for text, path in zip(*(training[name].to_pylist() for name in training.column_names), strict=True):
        rows[text, path] = None
    for texts, paths in zip(*(held_out[name].to_pylist() for name in held_out.column_names), strict=True):
        rows[texts[0], paths[0]] = None
    lines = [json.dumps({"text": text, "image": path or None}, ensure_ascii=False) + "\n" for text, path in rows]
    write_text(out / "targets.jsonl", "".join(lines))
    arguments = ["--model", model, "--input", str(out / "targets.jsonl"), "--out", str(out / "index")]
    arguments += ["--adapter", adapter] if adapter else []
    store = config.data.image_dir
    if store and Path(store).is_dir():
        arguments += ["--image-dir", store]
    elif any(path for _, path in rows):
        raise InputError(f"targets with images inside {store} cannot be indexed here; embed them with scripts/embed.py")
    if embed([*arguments, "--dtype", config.model.dtype]):
        raise SystemExit(2)
    return out / "index"


@partial(command, memory="lower train.chunk_tokens in the recipe")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="b3 train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True, help="jsonl or parquet file of queries and right answers")
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to, or .parquet of images")
    parser.add_argument("--out", type=Path, default=Path("runs/own"), help="folder to write (default runs/own)")
    parser.add_argument(
        "--model", help="to train; default: Qwen2-VL-2B, or a small text encoder if there are no images"
    )
    parser.add_argument("--teacher", help="that ranks targets for mining (default: named in the recipe)")
    parser.add_argument("--recipe-only", action="store_true", help="write the recipe and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of it")
    arguments = parser.parse_intermixed_args(argv)

    from b3.train.own import write

    recipe, numbers, num_held_out = write(
        arguments.pairs, arguments.images, arguments.out, arguments.model, arguments.teacher
    )
    config = load_config(recipe, arguments.overrides)
    print(f"recipe: {recipe}\n  model {config.model.name}, teacher {config.mining.teacher}")
    for name, why in numbers.why.items():
        print(f"  {name} {getattr(numbers, name)}: {why}")
    print(f"  {num_held_out:,} rows are held out")
    if arguments.recipe_only:
        return 0

    from b3.mining.plan import describe_plans
    from b3.mining.recipe import mine_recipe
    from b3.train.run import train

    say("mine")
    print(describe_plans(mine_recipe(config, show_progress=True)))
    say("train")
    if train(config).stopped:
        return EXIT_STOPPED
    run, base = config.output_dir, config.model.name
    model, adapter = (run, None) if config.model.train == "full" else (base, run)
    say("evaluate on what was held out (precision@1)")
    before, after = evaluate(config, "before", base, None), evaluate(config, "after", model, adapter)
    low, high = after["interval"]["mean"]
    print(f"before {100 * before['mean']:.1f}, after {100 * after['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    say("index the targets")
    folder = index(config, arguments.out, model, adapter)
    print(
        f'\nsearch: b3 search --index {folder} --query "..."        or with a page: b3 search --index {folder} --serve'
    )
    return 0


if __name__ == "__main__":
    from b3 import distributed

    distributed.leave(main())
