"""The miniature of a recipe: its settings on a tiny model and the embedded data, three steps on any machine.

What makes a recipe heavy is replaced: the backbone, the data sets (by embedded ones of the same families), the teacher,
and the sizes. Everything else stays, so that a recipe that starts this way has no mistake left in it but paths and
memory. Nothing is fetched from the network. The recipe of a text encoder gets a tiny RoBERTa, pairs of embedded
captions, and that RoBERTa as its teacher. Where a GPU is, precision, kernels and workers stay the recipe's as well.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3 import distributed, registry
from b3.config import Config, DatasetConfig
from b3.config.checks import check
from b3.data.datasets import load_pairs
from b3.data.tables import embedded_families
from b3.errors import RunError
from b3.files import write_json, write_text
from b3.train.checkpoint import DEBUG

if TYPE_CHECKING:
    from b3.model.embedder import Embedder

DATA = "emoji"
VISION_LANGUAGE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl")
ROWS, STEPS, SIZE, SHRINK = 160, 3, 16, 8  # rank windows are cut to an eighth


def stand_in(config: Config) -> type[Embedder]:
    """The kind of backbone, without network: told by its folder, or by a pooling that only text encoders have.

    Else by the model type in its name (`Qwen/Qwen3-VL-2B-Instruct`), and last Qwen2-VL, whose tuned models have any
    name.
    """
    from b3.model.embedder import backbone_class

    folder = Path(config.model.name)
    if (folder / "config.json").is_file():
        return backbone_class(folder)
    name = _letters(folder.name)
    kinds = ["roberta"] if config.model.pooling in ("mean", "cls") else VISION_LANGUAGE
    kind: type[Embedder] = registry.load("backbone", next((k for k in kinds if _letters(k) in name), kinds[0]))
    return kind


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def debug_config(config: Config, ranks: int = 1, on_gpu: bool = False) -> Config:
    """The recipe with what is heavy replaced; depends on nothing but the arguments (and `stand_in`).

    on_gpu: keep dtype, autocast, attention kernel, quantization and workers, which a CPU may not have.
    """
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    folder = f"{config.output_dir.rstrip('/')}-debug"
    tree |= {"name": f"{config.name}, debug", "output_dir": folder, "resume": "auto"}
    tree["model"] |= {
        "name": f"{folder}/model",
        "init_adapter": None,
        "shard": config.model.shard and ranks > 1,
    }
    tree["mining"] |= {"dir": f"{folder}/mining", "teacher_adapter": None, "teacher_prompt": None}
    reads_images = stand_in(config).reads_images
    _replace_rows(tree, config, folder)
    p, k = config.mining.p, config.mining.community_size
    small_k = 2 if k < 16 else 4 if k < 128 else 8  # keeps the order of the real ones
    tree["mining"] |= {
        "p": {f: math.ceil(n / SHRINK) for f, n in p.items()} if isinstance(p, dict) else math.ceil(p / SHRINK),
        "m": max(math.ceil(config.mining.m / SHRINK), 2 * config.negatives.per_query, 5),  # room for hard negatives
        "community_size": small_k,
    }
    if config.mining.teacher_dim is not None:
        tree["mining"] |= {"teacher_dim": 4}
    if config.model.dim is not None:
        tree["model"] |= {"dim": 12}
    step = math.lcm(ranks, small_k)
    tree["batch"] |= {
        "size": step * math.ceil(min(config.batch.size, SIZE) / step),
        "random_steps": min(config.batch.random_steps, 1) if config.batch.random_steps != "auto" else 1,
    }
    tree["train"] |= {
        "steps": STEPS,
        "warmup_steps": min(config.train.warmup_steps, 1),
        "save_every": 2,
        "log_every": 1,
        "chunk_tokens": 256,
        "trackers": [],
    }
    if not on_gpu:
        tree["model"] |= {"dtype": "float32", "attention": "auto", "quantize": None}
        tree["train"] |= {"workers": 0, "bf16": False}
    if config.train.lengths:  # in their order, below those of any tiny vector
        tree["train"] |= {"matryoshka": dict(enumerate((w for _, w in sorted(config.train.lengths.items())), start=2))}
    if not reads_images:
        tree.pop("eval", None)  # embedded evaluations show images
    elif config.eval is not None:
        tree["eval"] |= {"source": f"embedded:{DATA}", "split": "test", "subsets": ["emoji_i2t"], "image_dir": None}
        if config.eval.every is not None:
            tree["eval"] |= {"every": 2, "max_rows": 8}
    return Config.model_validate(tree)


def _replace_rows(tree: dict[str, Any], config: Config, folder: str) -> None:
    """Small rows and their teacher in place of the recipe's: written ones for a text encoder, else the embedded."""
    kind = stand_in(config)
    if not kind.reads_images:
        entries = [_small_entry(entry, entry.subset) for entry in config.data.datasets]
        tree["data"] |= {"source": f"jsonl:{folder}/data", "split": "train", "format": "mmeb", "datasets": entries}
        tree["mining"] |= {"teacher": f"{folder}/model"}
        return
    if "max_pixels" in kind.setting_names:
        tree["model"] |= {"min_pixels": 3136, "max_pixels": 12544}
    rows = {"source": f"embedded:{DATA}", "split": "train", "format": "mmeb", "image_dir": None}
    tree["data"] |= {**rows, "datasets": _stand_ins(config)}
    tree["mining"] |= {"teacher": "embedded"}
    if config.negatives.source == "data":  # which the embedded rows do not bring along
        tree["negatives"] |= {"source": "mined"}


def _stand_ins(config: Config) -> list[dict[str, Any]]:
    """Embedded data sets of the recipe's families; as many of a family as the recipe has, and as there are."""
    subsets: dict[str, list[str]] = {}
    for subset, family in embedded_families(DATA).items():
        subsets.setdefault(family, []).append(subset)
    if config.batch.policy == "b3_merged":  # merges classification sets, and one is no merger
        subsets["classification"].append(subsets["retrieval"].pop())
    return [
        _small_entry(entry, subsets[entry.family].pop(0)) | {"closed": False}  # embedded rows bring no options
        for entry in config.data.datasets
        if subsets[entry.family]
    ]


def _small_entry(entry: DatasetConfig, subset: str) -> dict[str, Any]:
    replaced = {"source", "split", "format", "image_dir", "p", "m"}
    return entry.model_dump(mode="json", exclude_unset=True, exclude=replaced) | {"subset": subset, "max_rows": ROWS}


def _write_texts(config: Config) -> None:
    """Pairs of texts for each data set of a text recipe: a request for a caption, and the caption."""
    requests, captions = (load_pairs(f"embedded:{DATA}", name) for name in ("emoji_t2i", "emoji_i2t"))
    pairs = dict(zip(requests.column("qry"), captions.column("pos_text"), strict=True))
    rows = [{"qry": q, "qry_image_path": "", "pos_text": t, "pos_image_path": ""} for q, t in pairs.items()]
    if config.negatives.source == "data":
        others = [rows[i - 1]["pos_text"] for i in range(len(rows))]
        rows = [{**row, "neg_text": other, "neg_image_path": ""} for row, other in zip(rows, others, strict=True)]
    for number, entry in enumerate(config.data.datasets):
        rows_of_entry = rows[number :: len(config.data.datasets)][:ROWS]
        text = "".join(json.dumps(row) + "\n" for row in rows_of_entry)
        write_text(Path(config.data.source.removeprefix("jsonl:")) / entry.subset / "train.jsonl", text)


def prepare(config: Config) -> Config:
    """Make the folder, the tiny model and the plans of a debug run, anew each time; returns its recipe.

    Raises:
        RunError: the folder is there and was not made by a debug run.
    """
    import torch

    from b3.mining.recipe import mine_recipe

    check(config)
    small = debug_config(config, distributed.launched_ranks(), torch.cuda.is_available())
    check(small)
    distributed.start(config.train.timeout_minutes)
    distributed.by_first(lambda: _make(small, stand_in(config)))
    if small.needs_plan or small.train.teacher_keys:
        mine_recipe(small)  # ranks share the ranking
        distributed.barrier()
    return small


def _make(config: Config, kind: type[Embedder]) -> None:
    from b3.console import no_bars
    from b3.data.datasets import load_datasets, texts_of

    run = Path(config.output_dir)
    if run.exists():
        if not (run / DEBUG).is_file() and (not run.is_dir() or any(run.iterdir())):
            raise RunError(f"{run} is there and not of a debug run; choose another output_dir or delete it")
        shutil.rmtree(run)
    write_json(run / DEBUG, {"stands for": config.name.removesuffix(", debug"), "data": DATA})
    if not kind.reads_images:
        _write_texts(config)
    texts = list(texts_of(load_datasets(config)))
    with no_bars():
        kind.tiny(Path(config.model.name), texts)
