"""The model card (README.md) that a run leaves beside its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from b3.config import Config, dump_config

if TYPE_CHECKING:
    from b3.data.records import PairDataset
    from b3.mining.plan import BatchPlan


def model_card(
    config: Config, datasets: list[PairDataset], plans: list[BatchPlan] | None, metrics: list[dict[str, Any]]
) -> str:
    """Markdown: how to load the adapter, the data and plan fingerprints, the last metrics, the recipe."""
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {config.model.name}",
        "tags: [sentence-similarity, multimodal-embedding, b3]",
        "---",
        f"# {config.name}",
        "",
        f"Adapter of an embedding model trained with b3: {config.train.steps} steps of {config.batch.size} pairs,"
        f" batches by policy `{config.batch.policy}`, temperature {config.train.temperature}. The vector is the last"
        " token's final hidden state, L2-normalised; positions are 1-D.",
        "",
        "```python",
        "from b3 import Embedder",
        f'model = Embedder.from_pretrained("{config.model.name}", adapter="{config.output_dir}")',
        'vectors = model.encode([{"text": "<|image_1|>\\nRepresent the given image.\\n", "image": "picture.png"}])',
        "```",
        "",
        "| data set | rows | data fingerprint | plan: K, p, m | mined negatives a query |",
        "|---|---|---|---|---|",
    ]
    for index, dataset in enumerate(datasets):
        plan = plans[index] if plans else None
        window = ", ".join(str(plan.manifest[key]) for key in ("K", "p", "m")) if plan else "none"
        mined = f"{plan.report['mined_negatives_per_query']:.2f}" if plan and plan.measured else ""
        lines.append(f"| {dataset.name} | {len(dataset)} | {dataset.fingerprint()[:16]} | {window} | {mined} |")
    if metrics:
        last = metrics[-1]
        lines += ["", f"Last step: loss {last['loss']:.4f}, in-batch precision@1 {last['in_batch_precision']:.3f}."]
    lines += ["", "Recipe:", "", "```yaml", dump_config(config).rstrip(), "```", ""]
    return "\n".join(lines)
