r"""Evaluate an embedding model on MMEB subsets (precision@1), with the command line of the published release.

    python eval_mmeb.py --model_name raghavlite/B3_Qwen2_2B --lora --lora_r 8 --bf16 --pooling eos --normalize True \
        --dataset_name TIGER-Lab/MMEB-eval --subset_name MSCOCO_i2t --dataset_split test \
        --per_device_eval_batch_size 4 --image_dir IMAGES --tgt_prefix_mod --encode_output_path OUT

Also under torchrun: the ranks share the work and the scores are the same bytes. Writes <subset>_score.json,
<subset>_pred.txt, summary.json, summary.md, leaderboard.json and, where a family is complete, families.png. Subsets
that are scored already are kept, and an interrupted run continues.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from b3.errors import command
from b3.eval.flags import RESOLUTIONS, build_parser, check, ignored, parse


@command
def main(argv: list[str] | None = None) -> int:
    arguments = parse(build_parser(__doc__), argv)
    first = os.environ.get("RANK", "0") == "0"
    for name in ignored(arguments) if first else ():
        print(f"note: --{name} has no effect on the evaluation")
    adapter = check(arguments)

    from b3 import distributed
    from b3.data.tables import list_subsets
    from b3.eval.benchmarks.mmeb import expand
    from b3.eval.report import markdown_table
    from b3.eval.run import EvalSpec, evaluate

    spec = EvalSpec(
        model=arguments.model_name,
        adapter=adapter,
        source=arguments.dataset_name,
        split=arguments.dataset_split,
        image_dir=arguments.image_dir,
        prefix_targets=arguments.tgt_prefix_mod,
        normalize=arguments.normalize,
        dtype="bfloat16" if arguments.bf16 else "float32",
        numerics=arguments.numerics,
        positions=arguments.positions,
        min_pixels=arguments.resize_min_pixels,
        max_pixels=arguments.resize_max_pixels,
        max_length=arguments.max_len,
        square=None if arguments.image_resolution is None else RESOLUTIONS[arguments.image_resolution],
        on_error=arguments.on_error,
    )
    subsets = expand(arguments.subset_name, list_subsets(spec.source, spec.split))
    try:
        distributed.start()
        summary = evaluate(
            spec,
            subsets,
            Path(arguments.encode_output_path),
            max_items=arguments.per_device_eval_batch_size,
            workers=arguments.dataloader_num_workers or 0,
            batch_tokens=arguments.batch_tokens,
            explain=arguments.explain,
            progress=True,
        )
    finally:
        distributed.stop()
    if first:
        print(markdown_table({"precision@1": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
