"""Our models in mteb's benchmarks.

    python -m b3.integrations.mteb --model runs/b3 --tasks NanoArguAnaRetrieval my.tasks:Emoji --out results

or, from Python, ``mteb.evaluate(Encoder("runs/b3"), tasks)``. Results lie where mteb puts those of any model, under a
revision made of the weights, so that results of other weights are never taken for these.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import b3
from b3.data.items import Item
from b3.errors import InputError, RunError, command
from b3.integrations.items import as_read, has_place_for_instructions
from b3.model.checkpoint import adapter_key, checkpoint_key
from b3.model.embedder import Embedder

try:
    import mteb
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise RunError(f"this needs mteb and Python 3.11 or newer; pip install 'b3[mteb]' ({error})") from None


class Encoder(AbsEncoder):
    """A model of ours behind mteb's interface.

    Args:
        model_name: hub name or folder of a model, or of an adapter; `revision` is not used, folders hold one.
        adapter: folder or hub name of an adapter to merge.
        query_prompt, document_prompt: put before each text, or the instruction where the prompt rule has a place for
            one. None: mteb's instruction of the task for queries where the rule has a place, else nothing.
        batch_tokens: as in `Embedder.encode`.
        settings: as for `Embedder.from_pretrained`.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        adapter: str | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        batch_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        self.model = Embedder.from_pretrained(model_name, adapter, device=device, **{"dtype": "auto", **settings})
        self.prompts = {"query": query_prompt, "document": document_prompt}
        self.batch_tokens = batch_tokens
        given = {name: value for name, value in self.prompts.items() if value is not None}
        self.mteb_model_meta = model_meta(self.model, model_name, adapter, {**settings, **given})

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """(N, D) float32 unit vectors of the rows of a data loader. Raises `DataError` for rows it cannot read."""
        prompt = self.prompt(task_metadata, prompt_type)
        items = [as_read(self.model, row, prompt) for row in rows(inputs)]
        bar = str(task_metadata.name) if options.get("show_progress_bar") else None
        return self.model.encode(items, batch_tokens=self.batch_tokens, progress=bar)

    def prompt(self, task_metadata: Any, prompt_type: Any) -> str:
        """What a query or a document is told it is for."""
        side = "document" if prompt_type is not None and prompt_type.value == "document" else "query"
        given = self.prompts[side]
        if given is not None:
            return given
        if side == "document" or not has_place_for_instructions(self.model):
            return ""
        instruction: str = self.get_task_instruction(task_metadata, prompt_type)
        return instruction


def rows(batches: Any) -> Iterator[dict[str, Any] | Item]:
    """Single rows of mteb's batches: dictionaries of text and image."""
    for batch in batches:
        kinds = [kind for kind in ("text", "image", "video", "audio") if kind in batch]
        if not kinds or not set(kinds) <= {"text", "image"}:
            raise InputError(
                f"a row has {', '.join(kinds) or 'neither text nor image'}; texts and images are read here"
            )
        for values in zip(*(batch[kind] for kind in kinds), strict=True):
            yield dict(zip(kinds, values, strict=True))


def model_meta(embedder: Embedder, name: str, adapter: str | None, given: dict[str, Any]) -> ModelMeta:
    """What mteb keeps of a model; what is not known (licence, languages, training data) stays open.

    Args:
        given: settings that replaced the checkpoint's own.
    """
    key = checkpoint_key(name) if adapter is None else checkpoint_key(name)[:20] + adapter_key(adapter)
    of_adapter = "" if adapter is None else f"-{Path(adapter).name}"
    title = name if name.count("/") == 1 and not Path(name).exists() else f"local/{Path(name).resolve().name}"
    count = sum(p.numel() for p in embedder.backbone.parameters())
    facts = {
        "loader": Encoder,
        "name": title + of_adapter,
        "revision": key[:40],
        "n_parameters": count,
        "memory_usage_mb": round(count * embedder.dtype.itemsize / 2**20),
        "max_tokens": embedder.settings.max_length,
        "embed_dim": embedder.dim,
        "open_weights": True,
        "framework": ["PyTorch", "Transformers", "safetensors"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": has_place_for_instructions(embedder),
        "adapted_from": embedder.source.get("base"),
        "modalities": ["text", "image"] if embedder.reads_images else ["text"],
        "experiment_kwargs": given or None,
    }
    return ModelMeta.create_empty(facts)


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks by mteb's names, or of a class given as module:Class. Raises `InputError` for a name that is neither."""
    found = []
    for name in names:
        module, colon, kind = name.partition(":")
        try:
            found.append(getattr(importlib.import_module(module), kind)() if colon else mteb.get_task(name))
        except (KeyError, ImportError, AttributeError) as error:
            what = str(error).splitlines()[0].strip("\"'")[:200]
            raise InputError(f"there is no task '{name}' ({what}); give a name of mteb, or module:Class") from None
    return found


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m b3.integrations.mteb",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="hub name or folder of a model, or of a run or other adapter")
    parser.add_argument("--adapter", help="folder or hub name of an adapter to merge")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--tasks", nargs="+", metavar="TASK", help="names of mteb, or module:Class of your own")
    chosen.add_argument("--benchmark", help="all tasks of a benchmark of mteb, such as 'MIEB(lite)'")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, as a cache of mteb")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--dim", type=int, help="cut vectors to their first so many numbers")
    parser.add_argument("--batch-tokens", type=int, help="tokens of one forward pass")
    parser.add_argument("--query-prompt", help="before each query (or its instruction, if the prompt rule has a place)")
    parser.add_argument("--document-prompt", help="before each document")
    arguments = parser.parse_args(argv)
    if arguments.benchmark:
        try:
            tasks = list(mteb.get_benchmark(arguments.benchmark).tasks)
        except KeyError:
            raise InputError(f"mteb has no benchmark '{arguments.benchmark}'; see mteb.get_benchmarks()") from None
    else:
        tasks = find_tasks(arguments.tasks)
    settings = {} if arguments.dim is None else {"dim": arguments.dim}
    encoder = Encoder(
        arguments.model, adapter=arguments.adapter, query_prompt=arguments.query_prompt, dtype=arguments.dtype,
        document_prompt=arguments.document_prompt, batch_tokens=arguments.batch_tokens, **settings,
    )  # fmt: skip
    results = mteb.evaluate(
        encoder, tasks, cache=mteb.ResultCache(arguments.out), co2_tracker=False, show_progress_bar=sys.stderr.isatty()
    )
    metrics = {task.metadata.name: task.metadata.main_score for task in tasks}
    for result in results.task_results:
        name = result.task_name
        print(f"{name:{max(map(len, metrics))}}  {metrics[name]}  {100 * result.get_score():.2f}")
    print(f"b3 {b3.__version__}, mteb {mteb.__version__}; results in {arguments.out}")
    return 0


if __name__ == "__main__":
    from b3 import distributed

    distributed.leave(main())
