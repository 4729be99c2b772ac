"""The models that the grid trains, made on the spot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import b3
from benchmarks.evidence.wordnet import LAYERS

HIDDEN, BLOCKS = 1024, 2
SMALL = (512, 1)  # hidden size and blocks of the student of `labels`: a third of the time
KEPT_LAYERS = 2
_LAYER = re.compile(r"\.layer\.(\d+)\.")


def make_heads(folder: Path, vectors: Path, hidden: int = HIDDEN, blocks: int = BLOCKS) -> None:
    """Untrained heads over frozen vectors; nothing is done when they are there.

    Raises RuntimeError if heads of another size are: a run's key names the folder alone.
    """
    from b3.model.backbones.heads import write_heads

    file = folder / "config.json"
    if not file.exists():
        write_heads(folder, vectors, hidden, blocks)
    found = json.loads(file.read_text())
    if (found["intermediate_size"], found["num_hidden_layers"]) != (hidden, blocks):
        raise RuntimeError(f"{folder} holds heads of another size than {blocks} of {hidden}; delete it")


def make_students(root: Path) -> None:
    """Untrained heads over each kind of frozen vectors of WordNet, below `root`/students."""
    for layer in LAYERS:
        make_heads(root / "students" / f"layer-{layer}", root / "wordnet" / f"vectors-{layer}")


def make_shallow(model_folder: Path, folder: Path) -> None:
    """The first layers of a BERT checkpoint as a checkpoint of its own; nothing is done when it is there."""
    from safetensors.torch import load_file, save_file

    if (folder / "config.json").exists():
        return
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tensors = {
        name: value
        for name, value in load_file(str(model_folder / "model.safetensors")).items()
        if not (found := _LAYER.search(name)) or int(found[1]) < KEPT_LAYERS
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {**json.loads((model_folder / "config.json").read_text()), "num_hidden_layers": KEPT_LAYERS}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_tiny(recipe: Path, folder: Path) -> None:
    """The random Qwen2-VL of the demo, its tokenizer trained on the recipe's texts; nothing when it is there."""
    from scripts.make_tiny_model import main

    if not (folder / "model.safetensors").exists() and main([str(recipe), "--out", str(folder)]):
        raise RuntimeError("the tiny model could not be made")


def place_pretrained(folder: Path) -> None:
    """The student that comes with the package."""
    if not (folder / "model.safetensors").exists():
        shutil.copytree(Path(b3.__file__).parent / "data" / "student", folder, dirs_exist_ok=True)
