"""What a finished run leaves: the adapter, merged weights if asked, the model card, the report, the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.config import Config, dump_config
from b3.files import publish, write_json, write_text
from b3.train.checkpoint import RESULT, plan_digest, read_metrics

if TYPE_CHECKING:
    import torch

    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan
    from b3.model.embedder import Embedder

MERGED = "merged"
# Files of the backbone that say how it is used; copied as they are.
COMPANIONS = ("chat_template.json", "chat_template.jinja", "generation_config.json")


def finish(config: Config, trainer: Any, datasets: list[PairDataset], plans: list[BatchPlan], seconds: float) -> None:
    """Write everything; last the file that says the run is complete. On the first rank only."""
    from b3.train.page import write_page

    folder = Path(config.output_dir)
    trainer.embedder.save(folder)
    if config.train.save_merged and config.model.train == "adapter":  # a full run's folder is a whole model already
        save_merged(config, folder, trainer.embedder.dtype)
    metrics, evaluations = read_metrics(folder), read_metrics(folder, "evaluation")
    last = evaluations[-1] if evaluations else None
    card = model_card(config, trainer.embedder, datasets, plans, metrics, last, trainer.bad_rows.lines)
    write_text(folder / "README.md", card)
    result = {
        "steps": config.train.steps,
        "seconds": round(seconds, 2),
        "last": metrics[-1] if metrics else None,
        "evaluation": last,
        "replaced_rows": len(trainer.bad_rows),
    }
    environment = json.loads((folder / "environment.json").read_text())
    rows = data_rows(datasets, plans)
    tree, recipe = config.model_dump(mode="json"), dump_config(config)
    write_page(folder / "report.html", tree, recipe, rows, environment, metrics, evaluations, result)
    shutil.rmtree(folder / ".saving", ignore_errors=True)
    write_json(folder / RESULT, result)


def save_merged(config: Config, folder: Path, dtype: torch.dtype) -> Path:
    """Write `folder`/merged: weights in `dtype`, tokenizer and image budget, in the layout of the hub.

    The sum is formed in float32 and rounded once, as when an adapter is merged on loading, so the vectors are those of
    `Embedder.from_pretrained(base, adapter=folder)`. Runs on the CPU, beside the trained model.
    """
    from b3.console import no_bars
    from b3.model.checkpoint import fetch
    from b3.model.embedder import Embedder

    target, staged = folder / MERGED, folder / f".{MERGED}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    model = Embedder.from_pretrained(
        config.model.name,
        adapter=folder,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        attention="sdpa",
    )  # with the adapter's settings, which are those of the trained model
    backbone: Any = model.backbone
    backbone.config._attn_implementation = None  # how it was run here is no fact about the weights
    with no_bars():
        backbone.save_pretrained(str(staged))
    model.save_settings(staged)
    base = fetch(config.model.name)
    for name in COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, staged / name)
    publish(staged, target)
    return target


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


def elsewhere(config: Config, embedder: Embedder) -> str:
    """How sentence-transformers loads the run, and what of it no module of that library expresses."""
    whole = config.model.train == "full" or config.train.save_merged
    folder = f"{config.output_dir}/merged" if config.train.save_merged else config.output_dir
    if whole and not embedder.reads_images:
        return f'In sentence-transformers: `SentenceTransformer("{folder}")`, the same vectors without b3.'
    text = (
        f'In sentence-transformers, with b3 installed: `SentenceTransformer("{folder}", trust_remote_code=True)`, the'
        " same vectors; the folder holds no code."
    )
    if embedder.reads_images:
        settings = embedder.settings
        rule = settings.prompt.splitlines()[0][:40]
        text += (
            f" Beyond that library's own module are the prompt rule (`{rule}`), positions `{settings.positions}` and"
            " the resizing of images."
        )
    return text


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
    where, example = config.output_dir, '"a text"'
    adapted = config.model.train == "adapter"
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
        *([f'model = Embedder.from_pretrained("{where}/merged")  # the same'] if config.train.save_merged else []),
        f"vectors = model.encode([{example}])",
        "```",
        "",
        elsewhere(config, embedder),
        "",
        "## Data",
        "",
        *markdown(data_rows(datasets, plans)),
    ]
    if replaced:
        lines += ["", f"{len(replaced)} unreadable rows were replaced by others, see bad_rows.jsonl."]
    lines += ["", "## Results", ""]
    if evaluation:
        scores = evaluation["evaluation"]
        lines += markdown([["subset", "precision@1, %"], *([name, f"{100 * v:.1f}"] for name, v in scores.items())])
        assert config.eval is not None
        rows = f", first {config.eval.max_rows} rows of each subset" if config.eval.max_rows else ""
        lines += ["", f"Measured by the run at step {evaluation['step']} on {config.eval.source}{rows}."]
    if metrics:
        last = metrics[-1]
        lines += ["", f"Last step: loss {last['loss']:.4f}, in-batch precision@1 {last['in_batch_precision']:.3f}."]
    lines += ["", "Curves: report.html.", "", "## Recipe", "", "```yaml", dump_config(config).rstrip(), "```", ""]
    return "\n".join(lines)
