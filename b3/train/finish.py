"""What a finished run leaves: the adapter, merged weights if asked, the model card, the report, the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.config import Config, dump_config
from b3.files import write_json, write_text
from b3.train.checkpoint import RESULT, read_metrics

if TYPE_CHECKING:
    from b3.data.datasets import PairDataset
    from b3.mining.plan import BatchPlan


def finish(config: Config, trainer: Any, datasets: list[PairDataset], plans: list[BatchPlan], seconds: float) -> None:
    """Write everything; last the file that says the run is complete. On the first rank only."""
    from b3.train.card import data_rows, model_card
    from b3.train.loop import save_adapter
    from b3.train.page import write_page

    folder = Path(config.output_dir)
    save_adapter(trainer.embedder, folder)
    if config.train.save_merged and config.model.train == "adapter":  # a full run's folder is a whole model already
        from b3.train.merge import save_merged

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
