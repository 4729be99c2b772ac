"""Checkpoints: find, identify, load and save one, and choose which of its parameters are trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b3.console import no_bars
from b3.errors import InputError, gist
from b3.files import sampled_sha256, sha256, write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

SETTINGS_FILE = "b3_settings.json"  # `b3.model.settings`
MODULES_FILE = "modules.json"  # of sentence-transformers
_LAYER = re.compile(r"(.*\.(?:layers|layer|blocks)\.)\d+\.")  # one of several equal ones
WEIGHT_FILES = ("*.safetensors", "*.json", "*.txt", "tokenizer*", "adapter_model.bin")


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: `name` itself if it is a folder, else downloaded from the hub (or its cache).

    Raises `InputError` if it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise InputError(f"model folder {name} does not exist; give a checkpoint folder or a hub name OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(WEIGHT_FILES)))
    except Exception as error:  # the client raises many types: offline, gated, not found, bad name
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model {name} is neither a local folder nor can it be fetched from the hub ({what})"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file as a dictionary. Raises `InputError` naming the file if it is missing, broken or something else."""
    content = _json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; take the file of a complete checkpoint")
    return content


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of a folder of sentence-transformers, none where it is not one. Errors as `read_json`."""
    file = folder / MODULES_FILE
    content = _json(file) if file.is_file() else []
    if not isinstance(content, list) or not all(isinstance(module, dict) for module in content):
        raise InputError(f"{file} holds no list of modules; take the file of a complete checkpoint")
    return content


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} holds no {file.name}; give the folder of a complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error})") from None


def write_modules(folder: Path, *modules: tuple[str, str]) -> None:
    """Write what `SentenceTransformer(folder)` reads first: (sub-folder, class) of each module, in order."""
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    write_json(folder / MODULES_FILE, entries)
    facts: dict[str, Any] = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None}
    write_json(folder / "config_sentence_transformers.json", {**facts, "similarity_fn_name": "cosine"})


def write_our_modules(folder: Path) -> None:
    """The same for what no module of theirs expresses: a class of b3, imported with consent (a name: it lies above)."""
    ours = "b3.integrations.sentence_transformers.EmbedderModule"
    write_modules(folder, ("", ours), ("2_Normalize", "sentence_transformers.models.Normalize"))


def checkpoint_key(name: str | Path) -> str:
    """SHA-256 over the weights, configuration and tokenizer of a checkpoint; equal content, equal key.

    An adapter repository includes the base that it names: the same adapter on another base is another model.
    """
    folder = fetch(name)
    digest = hashlib.sha256(_content_key(folder).encode())
    config = folder / "adapter_config.json"
    if config.is_file() and not list(folder.glob("model*.safetensors")):
        base = read_json(config).get("base_model_name_or_path")
        digest.update(checkpoint_key(base).encode() if base else b"")
    return digest.hexdigest()


def adapter_key(name: str | Path) -> str:
    """As `checkpoint_key`, of an adapter that is laid on a base of the caller's choice: its own files only."""
    return _content_key(fetch(name))


def sampled_key(name: str | Path) -> str:
    """As `checkpoint_key`, from parts of large files only: in milliseconds, for what is looked at in every start."""
    folder = fetch(name)
    config = folder / "adapter_config.json"
    is_adapter = config.is_file() and not list(folder.glob("model*.safetensors"))
    base = read_json(config).get("base_model_name_or_path") if is_adapter else None
    return _content_key(folder, sampled_sha256) + (f" on {sampled_key(base)}" if base else "")


def _content_key(folder: Path, key_of: Callable[[Path], str] = sha256) -> str:
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "adapter_model.bin", "config.json", "adapter_config.json", "tokenizer.json",
                "1_Pooling/config.json", "sentence_bert_config.json", SETTINGS_FILE)  # fmt: skip
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        digest.update(f"{file.name}\0{key_of(file)}\n".encode())
    return digest.hexdigest()


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None means the local rank's GPU if there is one, else the CPU."""
    import torch

    from b3 import distributed

    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", distributed.device_index())
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """'float32', 'bfloat16' or 'auto' (bfloat16 on a GPU, float32 on the CPU)."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise InputError(f"dtype '{name}' is not known; use one of auto, {', '.join(known)}")
    return known[name]


def model_type(folder: Path) -> str:
    """What `config.json` calls the architecture."""
    return str(read_json(folder / "config.json").get("model_type"))


def check_width(folder: Path) -> None:
    """Raise `InputError` if config.json gives the text model another width than its embedding has among the weights.

    Upstream makes such weights before it refuses them, of whatever size config.json says. Where no embedding is found
    or something cannot be read nothing is said: what loads it does.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    width, widths = None, set[int]()
    with contextlib.suppress(Exception), _silence():
        text = AutoConfig.from_pretrained(folder).get_text_config()
        width = getattr(text, "embedding_size", text.hidden_size)
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), "numpy") as weights:
                names = [n for n in weights.keys() if n.endswith(("embed_tokens.weight", "word_embeddings.weight"))]  # noqa: SIM118
                widths.update(weights.get_slice(name).get_shape()[-1] for name in names)
    if width is not None and widths and width not in widths:
        raise InputError(
            f"backbone in {folder} cannot be loaded: config.json gives hidden_size {width}, the weights have"
            f" {min(widths)}; take both from one checkpoint"
        )


def load_transformers(model_class: Any, folder: Path, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """A checkpoint as upstream's model, in eval mode, parameters frozen; `options` are further arguments of its loader.

    Raises `InputError` if it cannot be loaded or lacks weights.
    """
    import torch

    from b3.model.products import NARROW, use_onednn

    check_width(folder)
    try:
        with _silence():
            model, info = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **options
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise whatever their readers do
        raise InputError(f"backbone in {folder} cannot be loaded: {gist(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"backbone in {folder} lacks {len(missing)} weights, first: '{missing[0]}'")
    found = [match for name in model.state_dict() if (match := _LAYER.match(name))]
    layers, stacks = {match[0] for match in found}, {match[1] for match in found}
    left_out = [match for key in sorted(info["unexpected_keys"]) if (match := _LAYER.match(key))]
    beyond = [match[0] for match in left_out if match[1] in stacks and match[0] not in layers]
    if beyond:
        raise InputError(
            f"{folder} holds weights of layers that its config.json does not have, first: '{beyond[0]}'; take both from"
            " one checkpoint"
        )
    model.requires_grad_(False)
    if (device.type, dtype) == ("cpu", torch.float32) and model.config.get_text_config().hidden_size >= NARROW:
        use_onednn(model)
    return model.to(device).eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a checkpoint, neither cutting nor padding. Raises `InputError` if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # a damaged file raises whatever its reader does
        raise InputError(
            f"no tokenizer in checkpoint {folder} ({gist(error)}); copy the backbone's tokenizer files there"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer in {folder} is not a fast one; add its tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without upstream's bar and its table of weights that a model leaves out on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        logging.set_verbosity(level)


def unfreeze_all(backbone: nn.Module) -> None:
    """Make every parameter that reaches the vectors trainable, in float32 (the optimiser's steps vanish in 16 bit).

    A language head of its own weights stays frozen: it is never run. Tied to the embedding, it is trained as that.
    """
    core: Any = backbone
    backbone.float()
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)
    head = getattr(core, "lm_head", None)
    if head is not None and head.weight is not core.get_input_embeddings().weight:
        head.weight.requires_grad_(False)


def freeze_matching(backbone: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze trainable parameters whose name a regular expression finds; returns their names.

    Names are those of `named_parameters`, such as ``model.visual.merger.mlp.0.weight``; an adapter puts
    ``base_model.model.`` before them.

    Raises:
        InputError: a pattern is no regular expression or finds nothing, or nothing is left to train.
    """
    named = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    frozen: dict[str, None] = {}
    for pattern in patterns:
        try:
            names = [name for name in named if re.search(pattern, name)]
        except re.error as error:
            raise InputError(f"model.freeze '{pattern}' is not a regular expression: {error}") from None
        if not names:
            some = ", ".join(list(named)[:: max(1, len(named) // 3)][:3])
            raise InputError(
                f"model.freeze '{pattern}' matches none of the {len(named)} trained parameters (e.g. {some})"
            )
        frozen.update(dict.fromkeys(names))
    if len(frozen) == len(named):
        raise InputError(f"model.freeze {list(patterns)} leaves none of the {len(named)} parameters to train")
    for name in frozen:
        named[name].requires_grad_(False)
    return list(frozen)
