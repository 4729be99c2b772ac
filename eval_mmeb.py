r"""Evaluate an embedding model on MMEB (precision@1) or MMEB-V2, with the command line of the published release.

    python eval_mmeb.py --model_name raghavlite/B3_Qwen2_2B --lora --lora_r 8 --bf16 --pooling eos --normalize True \
        --dataset_name TIGER-Lab/MMEB-eval --subset_name MSCOCO_i2t --dataset_split test \
        --per_device_eval_batch_size 4 --image_dir IMAGES --tgt_prefix_mod --encode_output_path OUT

    python eval_mmeb.py --benchmark mmeb_v2 --model_name VLM2Vec/VLM2Vec-V2.0 --bf16 --normalize True \
        --data_basedir DIR --subset_name all --encode_output_path OUT      (or image, video, visdoc, V-RET, names ...)

Also under torchrun: the ranks share the work and the scores are the same bytes. Writes <subset>_score.json,
<subset>_pred.txt, summary.json, summary.md, leaderboard.json and, where a family is complete, families.png. Subsets
that are scored already are kept, and an interrupted run continues.

The reference parses model, data and training arguments together, so its commands carry flags that never mattered to an
evaluation. Each is accepted, with a note if it has no effect; one that contradicts the model is an error.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.errors import InputError, command
from b3.model.backbones.qwen_vl_images import MAX_PIXELS, MIN_PIXELS

if TYPE_CHECKING:
    from b3.eval.benchmark import Benchmark
    from b3.eval.run import EvalSpec
    from b3.model.settings import Settings

# Accepted, without effect on the numbers of this program.
IGNORED_VALUES = (
    "model_type processor_name model_backbone temperature num_crops uigraph_diff"
    " uimask_ratio lm_skip_layer vis_skip_layer resize_use_processor image_decay_factor num_sample_per_subset"
    " embedding_type dataset_config num_hardneg chunk_size eval_dataset_name eval_subset_name eval_image_dir"
    " output_dir resume_from project_name gc_q_chunk_size gc_p_chunk_size gc_dynamic_limit"
    " interleave_batch_size interleave_stopping_strategy local_rank ddp_timeout seed report_to run_name"
    " per_device_train_batch_size learning_rate max_steps warmup_steps logging_steps save_steps num_train_epochs"
).split()
IGNORED_SWITCHES = (
    "init_lora_model uigraph_use uigraph_rand uimask_rand sdibn odibn rdibn pos_only image_encoder_freeze grad_cache"
    " remove_unused_columns overwrite_output_dir do_eval do_train fp16 tf32"
).split()


HARNESSES = ("vlm2vec", "qwen3_vl_embedding")
NOTED = {  # settings that a checkpoint may have been trained under, and the flag that gives each
    "min_pixels": "--resize_min_pixels", "max_pixels": "--resize_max_pixels", "max_length": "--max_len",
    "positions": "--positions", "square": "--image_resolution", "prompt": "--benchmark mmeb_v2 has --prompt",
}  # fmt: skip
RESOLUTIONS = {"high": 1344, "mid": 672, "low": 128}
LORA_FLAGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}


def boolean(text: str) -> bool:
    """'True', 'false', '1', 'no', ...; raises `argparse.ArgumentTypeError` otherwise."""
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "y", "t"):
        return True
    if lowered in ("false", "0", "no", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not True or False")


def _switch(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """A boolean that may stand alone or take True or False."""
    parser.add_argument(
        f"--{name}", nargs="?", const=True, default=False, type=boolean, metavar="True|False", help=text
    )


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """All flags; those without effect are hidden from --help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name", required=True, help="hub name or folder of a full model or of an adapter repository")
    add("--checkpoint_path", help="adapter to use on top of --model_name")
    add("--pooling", default="last", help="last or eos, the same thing: the last token")
    _switch(parser, "normalize", "L2-normalise: cosine scores")
    _switch(parser, "lora", "merge the adapter found in --checkpoint_path or --model_name")
    add("--lora_r", type=int, help="checked against the adapter")
    add("--lora_alpha", type=int, help="checked against the adapter")
    add("--dataset_name", help="hub name, folder, or embedded:emoji (default: TIGER-Lab/MMEB-eval)")
    add("--subset_name", nargs="+", required=True, help="one or several subsets, or 'all'")
    add("--dataset_split", default="test")
    add("--image_dir", help="folder of the images")
    add("--encode_output_path", required=True, help="output folder")
    add("--max_len", type=int, help="cut text-only items to this many tokens")
    _switch(parser, "tgt_prefix_mod", "put the target prefixes of B3 before the targets (not for VLM2Vec checkpoints)")
    add("--resize_min_pixels", type=int, help=f"smallest image, pixels (default: {MIN_PIXELS})")
    add("--resize_max_pixels", type=int, help=f"largest image, pixels (default: {MAX_PIXELS})")
    add("--image_resolution", choices=tuple(RESOLUTIONS), help="square every image: 1344, 672 or 128 pixels per side")
    add("--per_device_eval_batch_size", type=int, help="upper bound on the items with images of one forward pass")
    _switch(parser, "bf16", "bfloat16 weights; otherwise float32")
    add(
        "--dataloader_num_workers",
        type=int,
        help="processes that read and resize images ahead (default: on a GPU the cores of the rank but one, at most 8)",
    )
    add("--lora_dropout", type=float, help="checked against the adapter")
    add("--lora_target_modules", help="checked against the adapter")
    more = parser.add_argument_group("not in the published program")
    more.add_argument(
        "--benchmark", help="tasks and published scores: mmeb, mmeb_v2, emoji, emoji_v2 (default: of the data)"
    )
    more.add_argument(
        "--numerics",
        choices=("clean", "reference"),
        default="clean",
        help="reference: round rotary frequencies (and with --bf16 targets) as the published program does",
    )
    more.add_argument(
        "--positions",
        choices=("1d", "mrope"),
        help="rotary positions; mrope for models that were trained with upstream's (default: 1d)",
    )
    more.add_argument(
        "--on_error",
        choices=("fail", "skip"),
        default="fail",
        help="skip: an unreadable item is counted and reported, its row stays in the denominator",
    )
    more.add_argument("--explain", type=int, default=0, help="write a page with so many wrong predictions per subset")
    more.add_argument("--dim", type=int, help="cut vectors to their first so many numbers (default: the checkpoint's)")
    more.add_argument("--batch_tokens", type=int, help="upper bound on the tokens of one forward pass")
    newer = parser.add_argument_group("MMEB-V2 (--benchmark mmeb_v2; without downloads: emoji_v2)")
    newer.add_argument(
        "--data_basedir", help="folder of the unpacked archives: image-tasks/, video-tasks/, visdoc-tasks/"
    )
    newer.add_argument("--harness", choices=HARNESSES, help="whose prompts and frames (default: by the model's prompt)")
    newer.add_argument("--prompt", help="prompt rule of the model (default: the checkpoint's, docs/backbones.md)")
    newer.add_argument(
        "--ndcg",
        choices=("right", "reference"),
        default="right",
        help="reference: pair grades with labels as the published program does, which scrambles unequal grades",
    )
    newer.add_argument(
        "--captions",
        choices=("path", "pair"),
        default="path",
        help="what tells captioned images apart: path, as the published program, or path and caption",
    )
    for name in IGNORED_VALUES:
        add(f"--{name}", f"--{name.replace('_', '-')}", nargs="*", default=None, dest=name, help=argparse.SUPPRESS)
    for name in IGNORED_SWITCHES:
        parser.add_argument(f"--{name}", nargs="?", const=True, default=None, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse a command; any flag of `transformers.TrainingArguments` that is not ours is accepted as without effect.

    Raises `InputError` for a flag that neither program knows.
    """
    arguments, rest = parser.parse_known_args(argv)
    arguments.training_flags = []
    if not rest:
        return arguments
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    for word in rest:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if not word.startswith("--"):
            continue  # the value of the flag before it
        if name not in known:
            raise InputError(f"unknown flag {word}; see --help")
        arguments.training_flags.append(name)
    return arguments


def ignored(arguments: argparse.Namespace) -> list[str]:
    """Names of the given flags that have no effect."""
    names = [name for name in (*IGNORED_VALUES, *IGNORED_SWITCHES) if getattr(arguments, name) is not None]
    if arguments.benchmark == "mmeb_v2":
        names = [name for name in names if name not in ("model_backbone", "resize_use_processor")]
    return names + arguments.training_flags


def check(arguments: argparse.Namespace) -> str | None:
    """The adapter to merge onto --model_name, or None. Raises `InputError` for flags that contradict each other."""
    from b3.model.adapter import CONFIG_FILE, is_adapter
    from b3.model.checkpoint import fetch, read_json

    if arguments.pooling not in ("last", "eos"):
        raise InputError(f"--pooling {arguments.pooling} is not supported; use last (or eos, the same)")
    for name, least in (
        ("max_len", 1),
        ("per_device_eval_batch_size", 1),
        ("batch_tokens", 1),
        ("dim", 1),
        ("explain", 0),
        ("dataloader_num_workers", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; give at least {least}")
    folder = fetch(arguments.model_name)
    extra: Path | None = None if arguments.checkpoint_path is None else fetch(arguments.checkpoint_path)
    if extra is not None and not is_adapter(extra):
        raise InputError(
            f"--checkpoint_path {extra} holds no {CONFIG_FILE}; name an adapter, a full model as --model_name"
        )
    source = extra or folder
    if arguments.lora and not is_adapter(source):
        raise InputError(f"--lora was given but {source} holds no {CONFIG_FILE}; name the adapter or drop --lora")
    if not arguments.lora and is_adapter(source):
        raise InputError(f"{source} is an adapter; add --lora to merge it")
    if arguments.lora:
        config = read_json(source / CONFIG_FILE)
        for flag, key in LORA_FLAGS.items():
            value, saved = getattr(arguments, flag), config.get(key)
            if flag == "lora_target_modules" and value is not None:
                value, saved = sorted(value.split(",")), sorted(saved) if isinstance(saved, list) else saved
            if value is not None and value != saved:
                raise InputError(f"--{flag} {value} contradicts the adapter in {source} ({key} {saved})")
    elif any(getattr(arguments, flag) is not None for flag in LORA_FLAGS):
        raise InputError("--lora_r, --lora_alpha, --lora_dropout and --lora_target_modules need --lora")
    return None if extra is None else str(extra)


V2_FLAGS = ("data_basedir", "harness", "prompt")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Settings` that flags give."""
    given = {
        "min_pixels": arguments.resize_min_pixels,
        "max_pixels": arguments.resize_max_pixels,
        "max_length": arguments.max_len,
        "positions": arguments.positions,
        "square": arguments.image_resolution and RESOLUTIONS[arguments.image_resolution],
        "dim": arguments.dim,
        "prompt": arguments.prompt,
    }
    return {"numerics": arguments.numerics} | {name: value for name, value in given.items() if value is not None}


def note_settings(chosen: Settings, *names: str) -> None:
    """Say which settings of the checkpoint this evaluation does not take: the flags count, as published."""
    from b3.distributed import is_first
    from b3.model.checkpoint import fetch
    from b3.model.settings import read_settings

    for name, value in read_settings(*map(fetch, dict.fromkeys(names))).items():
        if name in NOTED and value != getattr(chosen, name) and is_first():
            print(f"note: {name} is {getattr(chosen, name)} here, and the checkpoint says {value} ({NOTED[name]})")


def spec_of(arguments: argparse.Namespace, adapter: str | None, benchmark: Benchmark) -> EvalSpec:
    """What decides the numbers. Raises `InputError` for flags that are for another benchmark."""
    from b3.eval.run import EvalSpec
    from b3.model.settings import Settings

    spec = EvalSpec(
        model=arguments.model_name,
        adapter=adapter,
        source=arguments.dataset_name or benchmark.source,
        split=arguments.dataset_split,
        image_dir=arguments.image_dir,
        prefix_targets=arguments.tgt_prefix_mod,
        normalize=arguments.normalize,
        dtype="bfloat16" if arguments.bf16 else "float32",
        on_error=arguments.on_error,
    )
    settings = settings_of(arguments)
    if benchmark.has_harnesses and arguments.model_backbone == ["gme"]:
        settings.setdefault("prompt", "gme")
    if not benchmark.has_harnesses:
        for name in V2_FLAGS:
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name} is for --benchmark mmeb_v2 or emoji_v2, not {benchmark.name}; drop it")
        chosen = Settings(**settings)
        note_settings(chosen, adapter or arguments.model_name, arguments.model_name)
        return replace(spec, settings=chosen)

    from b3.eval.benchmarks.mmeb_v2.harness import harness_settings
    from b3.model.embedder import locate

    uses_processor = arguments.resize_use_processor is None or boolean(
        "".join(arguments.resize_use_processor) or "True"
    )
    if "square" in settings and uses_processor:
        print("note: --image_resolution has no effect without --resize_use_processor False")
        del settings["square"]
    base, of_adapter = locate(arguments.model_name, adapter)
    harness, prompt, chosen = harness_settings(
        arguments.harness, adapter or arguments.model_name, settings, of_adapter, base
    )
    options = {"harness": harness, "prompt": prompt, "ndcg": arguments.ndcg, "captions": arguments.captions}
    return replace(
        spec,
        image_dir=arguments.data_basedir,
        settings=chosen,
        options=options | {"lenient": arguments.on_error == "skip"},
    )


@partial(command, memory="lower --batch_tokens, or give fewer --dataloader_num_workers")
def main(argv: list[str] | None = None) -> int:
    arguments = parse(build_parser(__doc__), argv)
    first = os.environ.get("RANK", "0") == "0"
    for name in ignored(arguments) if first else ():
        print(f"note: --{name} has no effect on the evaluation")
    adapter = check(arguments)

    from b3 import distributed, registry
    from b3.eval.benchmark import of_source
    from b3.eval.ranking_report import ranking_table
    from b3.eval.report import markdown_table
    from b3.eval.run import evaluate

    name, source = arguments.benchmark, arguments.dataset_name
    benchmark = of_source(source) if name is None else registry.load("benchmark", name)
    spec = spec_of(arguments, adapter, benchmark)
    subsets = benchmark.expand(arguments.subset_name, benchmark.subsets(spec.source, spec.split))
    distributed.start()
    summary = evaluate(
        spec,
        subsets,
        Path(arguments.encode_output_path),
        benchmark=benchmark,
        max_media=arguments.per_device_eval_batch_size,
        workers=arguments.dataloader_num_workers,
        batch_tokens=arguments.batch_tokens,
        explain=arguments.explain,
        progress=True,
    )
    distributed.stop()
    if first and "tasks" in summary:
        print(ranking_table(summary, benchmark))
    elif first:
        print(markdown_table({"precision@1": summary}, benchmark))
    return 0


if __name__ == "__main__":
    from b3 import distributed

    distributed.leave(main())
