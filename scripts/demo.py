"""The whole of B3 on embedded data, on two CPU cores: mine, train three arms, evaluate four models, show what came out.

    python scripts/demo.py                 everything below runs/demo; finished stages are kept
    python scripts/demo.py train.steps=20  with overrides of configs/demo.yaml (into runs/demo as well)

The student comes with the package, pretrained on other drawings (b3/data/student/README.md). The arms differ in nothing
but the batches: `random` draws rows of one data set at a time (the fair control), `b3` takes communities of the mined
plan, `b3x` starts with random batches until the student finds half of its targets in them, then takes communities and
adds mined hard negatives to each query. Same model, data, steps, batch size and seed.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Threads that wait spin only shortly: on a machine with other work, spinning takes the core from what is waited for.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the programs beside it

from b3.config import Config, load_config
from b3.errors import RunError, command

if TYPE_CHECKING:
    import numpy as np

    from b3.eval.run import EvalSpec

ROOT = Path("runs/demo")
RECIPE = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
STUDENT = Path(__file__).resolve().parents[1] / "b3" / "data" / "student"
ARMS = {  # what an arm says beside the recipe
    "random": ("batch.policy=random",),
    "b3": ("batch.policy=b3",),
    "b3x": ("batch.policy=b3", "batch.random_steps=auto", "negatives.per_query=4", "negatives.after_random=true"),
}
DRAWS = 4000  # of the bootstrap
QUERIES = (
    "red apple",
    "happy face",
    "sad face",
    "flag of a country",
    "birthday party",
    "car",
    "wild animal",
    "sports ball",
    "rainy weather",
    "heart",
)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


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


def spec_of(config: Config, model: str) -> EvalSpec:
    from b3.eval.run import EvalSpec
    from b3.model.settings import Settings

    assert config.eval is not None
    return EvalSpec(
        model=model,
        source=config.eval.source,
        split=config.eval.split,
        image_dir=config.eval.image_dir,
        prefix_targets=config.eval.prefix_targets,
        dtype="float32",
        settings=Settings(**config.model.settings()),
    )


def evaluate(config: Config, name: str, model: str) -> dict[str, Any]:
    from b3.eval.run import evaluate as run

    assert config.eval is not None
    return run(spec_of(config, model), config.eval.subsets, ROOT / "eval" / name, progress=True)


def evaluate_modalities(config: Config, name: str, model: str) -> dict[str, Any]:
    """Images, films and pages, in the manner of MMEB-V2."""
    from b3.eval.benchmarks.emoji_v2 import EMOJI_V2
    from b3.eval.run import evaluate as run

    options = {"harness": "vlm2vec", "prompt": "plain"}
    spec = replace(spec_of(config, model), source=EMOJI_V2.source, options=options)
    return run(spec, EMOJI_V2.names, ROOT / "eval_v2" / name, benchmark=EMOJI_V2, progress=True)


def right_rows(config: Config, name: str) -> list[np.ndarray]:
    """By subset whether the right candidate came first, 0 or 1, as the evaluation's files tell."""
    import numpy as np

    from b3.data.datasets import load_eval

    assert config.eval is not None
    found = []
    for subset in config.eval.subsets:
        data = load_eval(config.eval.source, subset, config.eval.split)
        told = (ROOT / "eval" / name / f"{subset}_pred.txt").read_text().splitlines()
        right = [line == str(data.raw_candidates(row)[0]) for row, line in enumerate(told)]
        found.append(np.asarray(right, dtype=np.float64))
    return found


def gap(arm: list[np.ndarray], control: list[np.ndarray]) -> list[float]:
    """[difference of the means over subsets, low, high]: 95 % interval over resampled test rows, paired by row."""
    import numpy as np

    random, differences, drawn = np.random.default_rng(0), [], np.zeros(DRAWS)
    for own, other in zip(arm, control, strict=True):
        delta = own - other
        counts = random.multinomial(len(delta), np.full(len(delta), 1 / len(delta)), size=DRAWS)
        drawn += counts @ delta / len(delta) / len(arm)
        differences.append(delta.mean())
    return [float(np.mean(differences)), *np.quantile(drawn, [0.025, 0.975]).tolist()]


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
    rows = {arm: right_rows(configs[arm], arm) for arm in ARMS}
    pairs = [("b3", "random"), ("b3x", "random"), ("b3x", "b3")]
    gaps = {f"{arm} - {control}": gap(rows[arm], rows[control]) for arm, control in pairs}
    summary = {"arms": arms, "differences": gaps, "seconds": round(seconds, 1), "mining": mining}
    write_json(ROOT / "summary.json", summary)
    lines = [f"| {name} | {100 * d:+.1f} | {100 * a:+.1f} to {100 * b:+.1f} |" for name, (d, a, b) in gaps.items()]
    heads = ["", "| difference of means | points | 95 % interval over test rows |", "|---|---:|---:|"]
    write_text(ROOT / "summary.md", "\n".join([markdown_table(results, benchmark), *heads, *lines]) + "\n")
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


def search(model: str) -> Path:
    """Index the emoji's images with a model and write a page of what it finds for some words."""
    import pyarrow.parquet as pq

    from b3.data.tables import default_image_dir
    from scripts import embed, search

    images, rows, queries = default_image_dir("embedded:emoji"), ROOT / "drawings.parquet", ROOT / "queries.jsonl"
    assert images is not None
    table = pq.read_table(images)
    is_single = [path.startswith(("google/", "twitter/")) for path in table["path"].to_pylist()]
    pq.write_table(table.filter(is_single), rows)
    asked = [{"text": f"Find me an emoji that matches the given caption: {words}\n"} for words in QUERIES]
    queries.write_text("".join(json.dumps(line) + "\n" for line in asked))
    columns = ["--image-column", "bytes", "--id-column", "path", "--instruction", "Represent the given image.\n"]
    if embed.main(["--model", model, "--input", str(rows), *columns, "--out", str(ROOT / "index")]):
        raise RunError("the emoji could not be indexed; see the message above")
    page = ROOT / "search.html"
    with redirect_stdout(io.StringIO()):  # the page shows it better
        search.main(["--index", str(ROOT / "index"), "--queries", str(queries), "--top", "8", "--html", str(page)])
    return page


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
    overrides = [f"model.name={STUDENT}", *overrides]
    base = load_config(RECIPE, overrides)
    configs = {arm: load_config(RECIPE, [*overrides, *keys, f"output_dir={ROOT / arm}"]) for arm, keys in ARMS.items()}
    mining = mine(configs["b3x"])  # the plans of all arms: those of b3 need no hard negatives
    for arm, config in configs.items():
        say(f"train: {arm} batches")
        train(config)
    say("evaluate: precision@1 over each row's candidates, on concepts and scenes that training never saw")
    models = {"pretrained": base.model.name, **{arm: config.output_dir for arm, config in configs.items()}}
    results = {name: evaluate(base, name, model) for name, model in models.items()}
    say("evaluate: images, films and pages; training saw images and texts alone")
    of_v2 = {name: evaluate_modalities(base, name, model) for name, model in models.items()}
    say("search: what the last student finds for some words")
    page = search(configs["b3x"].output_dir)
    seconds = before if before else time.perf_counter() - started
    summarise(configs, results, mining, seconds)
    write_modalities(of_v2)
    print((ROOT / "summary.md").read_text())
    took = time.perf_counter() - started
    print(f"{took:.0f} s" + (f" (the first run took {before:.0f} s)" if before else ""))
    print(f"numbers:  {ROOT}/summary.json\nplots:    {ROOT}/loss.png, {ROOT}/precision.png")
    print(f"to look at: {page}, {ROOT}/mining/report.html (communities)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
