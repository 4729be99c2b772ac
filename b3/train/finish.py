"""What a finished run leaves: the adapter, merged weights if asked, the model card, the report, the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.config import Config, dump_config
from b3.files import move_in, write_json, write_text
from b3.train.checkpoint import RESULT, plan_digest, read_metrics, stage

if TYPE_CHECKING:
    import torch

    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.model.embedder import Embedder

MERGED = "merged"


def finish(config: Config, trainer: Any, datasets: list[PairDataset], plans: list[BatchPlan], seconds: float) -> None:
    """Write everything; last the file that says the run is complete. On the first rank only."""
    from b3.train.page import write_page

    folder = Path(config.output_dir)
    staged = stage(folder)
    trainer.embedder.save(staged)
    move_in(staged, folder, "adapter_config.json" if config.model.train == "adapter" else "config.json")
    if config.train.save_merged and config.model.train == "adapter":  # a full run's folder is a whole model already
        save_merged(config, folder, trainer.embedder.dtype)
    metrics, evaluations = read_metrics(folder), read_metrics(folder, "evaluation")
    last = evaluations[-1] if evaluations else None
    card = model_card(config, trainer.embedder, datasets, plans, metrics, last, trainer.bad_rows.lines)
    write_text(folder / "README.md", card)
    result = {
        "steps": config.train.steps,
        "random_steps": trainer.sampler.random_steps,
        "seconds": round(seconds, 2),
        "last": metrics[-1] if metrics else None,
        "evaluation": last,
        "replaced_rows": len(trainer.bad_rows),
    }
    environment = json.loads((folder / "environment.json").read_text())
    rows = data_rows(datasets, plans)
    tree, recipe = config.model_dump(mode="json"), dump_config(config)
    write_page(folder / "report.html", tree, recipe, rows, environment, metrics, evaluations, result)
    write_json(folder / RESULT, result)


def save_merged(config: Config, folder: Path, dtype: torch.dtype) -> Path:
    """Write `folder`/merged: the trained model as any software loads it (`b3.model.export`)."""
    from b3.model.export import export

    return export(config.model.name, folder, folder / MERGED, str(dtype).removeprefix("torch."))


def data_rows(datasets: list[PairDataset], plans: list[BatchPlan]) -> list[list[str]]:
    """A header and a row per data set: what was trained on, and what made its batches."""
    header = ["data set", "rows", "data fingerprint"]
    of_plan = ["K, p, m", "teacher", "plan fingerprint", "mined negatives per query"]
    rows = [header + of_plan if plans else header]
    for index, dataset in enumerate(datasets):
        cells = [dataset.name, f"{len(dataset):,}", dataset.fingerprint()[:16]]
        if plans:
            plan = plans[index]
            window = ", ".join(str(plan.manifest.get(key)) for key in ("community_size", "p", "m"))
            mined = f"{plan.report['mined_negatives_per_query']:.2f}" if plan.measured else "imported"
            cells += [window, str(plan.manifest.get("teacher")), plan_digest(plan)[:16], mined]
        rows.append(cells)
    return rows


def markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return lines


def model_card(
    config: Config,
    embedder: Embedder,
    datasets: list[PairDataset],
    plans: list[BatchPlan],
    metrics: list[dict[str, Any]],
    evaluation: dict[str, Any] | None,
    replaced: list[dict[str, Any]],
) -> str:
    """Markdown: how to load the model, data and plan fingerprints, results, the recipe."""
    from b3.model.export import in_sentence_transformers

    where, example = config.output_dir, '"a text"'
    adapted = config.model.train == "adapter"
    merged = adapted and config.train.save_merged
    if embedder.vision is not None:
        example = '{"text": "<|image_1|>\\nRepresent the given image.\\n", "image": "image.png"}'
    lines = [
        "---",
        f"library_name: {'peft' if adapted else 'sentence-transformers'}",
        f"base_model: {config.model.name}",
        "tags: [sentence-transformers, sentence-similarity, multimodal-embedding, b3]",
        "---",
        f"# {config.name}",
        "",
        f"{'Adapter of an embedding model' if adapted else 'Embedding model'} trained with b3:"
        f" {config.train.steps} steps of {config.batch.size} pairs,"
        f" batches by policy `{config.batch.policy}`, temperature {config.train.temperature}. The vector is"
        f" {embedder.describe()}.",
        "",
        "```python",
        "from b3 import Embedder",
        f'model = Embedder.from_pretrained("{config.model.name}", adapter="{where}")'
        if adapted
        else f'model = Embedder.from_pretrained("{where}")',
        *([f'model = Embedder.from_pretrained("{where}/{MERGED}")  # the same'] if merged else []),
        f"vectors = model.encode([{example}])",
        "```",
        "",
        in_sentence_transformers(
            embedder,
            f"{where}/{MERGED}" if config.train.save_merged else where,
            not adapted or config.train.save_merged,
        ),
        "",
        "## Data",
        "",
        *markdown(data_rows(datasets, plans)),
    ]
    if replaced:
        lines += ["", f"{len(replaced)} unreadable rows were replaced by others, see bad_rows.jsonl."]
    lines += ["", "## Results", "", *_results(config, metrics, evaluation)]
    lines += ["", "Curves: report.html.", "", "## Recipe", "", "```yaml", dump_config(config).rstrip(), "```", ""]
    return "\n".join(lines)


def _results(config: Config, metrics: list[dict[str, Any]], evaluation: dict[str, Any] | None) -> list[str]:
    """Scores of the last evaluation and the last step's loss; empty where there are none."""
    lines: list[str] = []
    if evaluation:
        scores = evaluation["evaluation"]
        lines += markdown([["subset", "precision@1, %"], *([name, f"{100 * v:.1f}"] for name, v in scores.items())])
        assert config.eval is not None
        rows = f", first {config.eval.max_rows} rows of each subset" if config.eval.max_rows else ""
        lines += ["", f"Measured by the run at step {evaluation['step']} on {config.eval.source}{rows}."]
    if metrics:
        last = metrics[-1]
        lines += ["", f"Last step: loss {last['loss']:.4f}, in-batch precision@1 {last['in_batch_precision']:.3f}."]
    return lines
