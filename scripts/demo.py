"""The whole of B3 on embedded data, on two CPU cores: mine, train two arms, evaluate three models, show what came out.

    python scripts/demo.py                 everything below runs/demo; finished stages are kept
    python scripts/demo.py train.steps=20  with overrides of configs/demo.yaml (into runs/demo as well)

The arms differ in nothing but the batches: `random` draws rows of one data set at a time (the fair control), `b3` takes
communities of the mined plan. Same model, data, steps, batch size and seed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Threads that wait spin only shortly: on a machine with other work, spinning takes the core from what is waited for.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from b3.config import Config, load_config
from b3.errors import RunError, command

if TYPE_CHECKING:
    from b3.eval.run import EvalSpec

ROOT = Path("runs/demo")
RECIPE = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
ARMS = ("random", "b3")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def make_model(config: Config) -> None:
    """The random backbone, once."""
    if (Path(config.model.name) / "model.safetensors").exists():
        return
    from b3.data.datasets import load_datasets, texts_of
    from b3.model.backbones.tiny import make_tiny_model

    say(f"a tiny random Qwen2-VL, its tokenizer trained on the data's texts -> {config.model.name}")
    texts = texts_of(load_datasets(load_config(RECIPE)))
    make_tiny_model(Path(config.model.name), texts, hidden=128, layers=2, vision_layers=2, vocab_size=2048, seed=0)


def mine(config: Config) -> dict[str, Any]:
    """Plans of all data sets; returns their reports."""
    from b3.mining.plan import describe_plans
    from b3.mining.recipe import mine_recipe

    say("mine: rank targets by the teacher, cut the graph into communities of hard negatives")
    plans = mine_recipe(config, show_progress=True)
    print(describe_plans(plans))
    return {name: plan.report for name, plan in plans.items()}


def train(config: Config) -> None:
    from b3.train.run import train as run

    if run(config).stopped:
        raise RunError("stopped as asked; what is done is kept, the same command continues")


def spec_of(config: Config, adapter: str | None) -> EvalSpec:
    from b3.eval.run import EvalSpec
    from b3.model.settings import Settings

    assert config.eval is not None
    return EvalSpec(
        model=config.model.name,
        adapter=adapter,
        source=config.eval.source,
        split=config.eval.split,
        image_dir=config.eval.image_dir,
        prefix_targets=config.eval.prefix_targets,
        dtype="float32",
        settings=Settings(**config.model.settings()),
    )


def evaluate(config: Config, name: str, adapter: str | None) -> dict[str, Any]:
    from b3.eval.run import evaluate as run

    assert config.eval is not None
    return run(spec_of(config, adapter), config.eval.subsets, ROOT / "eval" / name, progress=True)


def evaluate_modalities(config: Config, name: str, adapter: str | None) -> dict[str, Any]:
    """Images, films and pages, in the manner of MMEB-V2."""
    from b3.eval.benchmarks.emoji_v2 import EMOJI_V2
    from b3.eval.run import evaluate as run

    options = {"harness": "vlm2vec", "prompt": "plain"}
    spec = replace(spec_of(config, adapter), source=EMOJI_V2.source, options=options)
    return run(spec, EMOJI_V2.names, ROOT / "eval_v2" / name, benchmark=EMOJI_V2, progress=True)


def summarise(
    configs: dict[str, Config], results: dict[str, Any], mining: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Write summary.json, summary.md and the plots; returns the summary."""
    from b3.eval.benchmark import of_source
    from b3.eval.plots import plot_losses, plot_precision
    from b3.eval.report import markdown_table
    from b3.files import write_json, write_text
    from b3.train.checkpoint import read_metrics

    evaluation = configs["b3"].eval
    assert evaluation is not None
    benchmark = of_source(evaluation.source)
    arms = {name: {**result["subsets"], "mean": result["mean"]} for name, result in results.items()}
    summary = {"arms": arms, "seconds": round(seconds, 1), "mining": mining}
    write_json(ROOT / "summary.json", summary)
    write_text(ROOT / "summary.md", markdown_table(results, benchmark) + "\n")
    plot_losses({arm: read_metrics(Path(c.output_dir)) for arm, c in configs.items()}, ROOT / "loss.png")
    plot_precision(results, ROOT / "precision.png", benchmark)
    return summary


def write_modalities(results: dict[str, Any]) -> None:
    """Add the table of modalities to summary.md."""
    from b3.eval.benchmarks.emoji_v2 import EMOJI_V2
    from b3.eval.ranking_report import modality_table
    from b3.files import write_text

    text = (ROOT / "summary.md").read_text()
    write_text(ROOT / "summary.md", f"{text}\n{modality_table(results, EMOJI_V2)}\n")


def earlier_seconds() -> float:
    """What finished stages of an interrupted or earlier demo have taken."""
    try:
        return float(json.loads((ROOT / "summary.json").read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0


@command
def main(argv: list[str] | None = None) -> int:
    overrides = sys.argv[1:] if argv is None else argv
    if any(o in ("-h", "--help") for o in overrides):
        print(__doc__)
        return 0
    started, before = time.perf_counter(), earlier_seconds()
    base = load_config(RECIPE, overrides)
    configs = {
        arm: load_config(RECIPE, [*overrides, f"batch.policy={arm}", f"output_dir={ROOT / arm}"]) for arm in ARMS
    }
    make_model(base)
    mining = mine(base)
    for arm, config in configs.items():
        say(f"train: {arm} batches")
        train(config)
    say("evaluate: precision@1 over each row's candidates, on concepts and scenes that training never saw")
    results = {"untrained": evaluate(base, "untrained", None)}
    for arm, config in configs.items():
        results[arm] = evaluate(config, arm, config.output_dir)
    say("evaluate: images, films and pages; training saw images and texts alone")
    adapters = {"untrained": None, **{arm: config.output_dir for arm, config in configs.items()}}
    of_v2 = {name: evaluate_modalities(base, name, adapter) for name, adapter in adapters.items()}
    seconds = before if before else time.perf_counter() - started
    summarise(configs, results, mining, seconds)
    write_modalities(of_v2)
    print((ROOT / "summary.md").read_text())
    took = time.perf_counter() - started
    print(f"{took:.0f} s" + (f" (the first run took {before:.0f} s)" if before else ""))
    print(f"numbers:  {ROOT}/summary.json\nplots:    {ROOT}/loss.png, {ROOT}/precision.png")
    print(f"communities to look at: {ROOT}/mining/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
