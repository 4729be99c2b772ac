"""LoRA and DoRA adapters: attach a fresh one for training, load a saved one, merge one into the weights.

Attaching and saving go through `peft`. Merging is ours: in float32 whatever the model's dtype, without importing
`peft`, and every tensor of the file must be consumed; peft only warns when the names do not fit, which silently
evaluates the bare backbone.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from b3 import registry
from b3.distributed import is_first
from b3.errors import InputError
from b3.model.checkpoint import model_type, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIG_FILE = "adapter_config.json"
# The suffix list of the authors' code. In Qwen2-VL it matches q, k, v, o and down of each decoder layer and nothing in
# the vision tower.
PAPER_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj")
# transformers 5 nests the language model; adapters saved before carry the old names.
_OLD_LANGUAGE = re.compile(r"^base_model\.model\.model\.(layers|norm|embed_tokens)\.")
_OLD_VISION = re.compile(r"^base_model\.model\.(visual|vision_tower|multi_modal_projector)\.")
_OLD_INTERNVL = re.compile(r"^base_model\.model\.language_model\.model\.")
_PART = re.compile(r"^base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def check_backbone(folder: Path, base: Path) -> None:
    """Raise `InputError` if the adapter in `folder` says that it was trained on another kind of backbone than `base`.

    And say so if it was trained on one of another name.

    It says so by the config.json beside it, or by the name of its base. Backbones of different kinds may have layers of
    the same names and shapes, so that its weights alone need not tell.
    """
    kind, name = model_type(base), str(read_json(folder / CONFIG_FILE).get("base_model_name_or_path") or "")
    if (folder / "config.json").is_file():
        trained = model_type(folder)
    else:
        letters = _letters(Path(name).name)
        named = [one for one in registry.BACKBONES if _letters(one) in letters]
        trained = named[0] if len(named) == 1 else kind
    if trained != kind:
        raise InputError(
            f"the adapter in {folder} was trained on {trained} (base {name or 'not named'}), and {base} is {kind}; take"
            " the backbone that it belongs to"
        )
    if name and is_first() and not any(_letters(part).endswith(_letters(Path(name).name)) for part in base.parts):
        print(f"note: the adapter in {folder} was trained on {name}, and is laid on {base}", file=sys.stderr)


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def new_name(key: str) -> str:
    """The transformers 5 name of an adapter tensor saved under transformers 4 (unchanged if it is already new)."""
    key = _OLD_LANGUAGE.sub(r"base_model.model.model.language_model.\1.", key)
    key = _OLD_INTERNVL.sub("base_model.model.model.language_model.", key)
    return _OLD_VISION.sub(r"base_model.model.model.\1.", key)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, tensors under new names). `.bin` files are read with weights only.

    Raises:
        InputError: no weights, an unreadable file, or an adapter kind that is not LoRA/DoRA on linear layers.
    """
    import torch
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG_FILE)
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise InputError(f"{folder / CONFIG_FILE}: {key} is {str(config.get(key))[:60]}, not a positive number")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if config.get(key):
            raise InputError(f"{folder / CONFIG_FILE}: {key} is set, which is not supported; merge it with peft first")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise InputError(f"{folder / CONFIG_FILE}: only LoRA and DoRA adapters without bias are supported")
    file, old_file = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not file.is_file() and not old_file.is_file():
        raise InputError(f"{folder} has no adapter_model.safetensors (or .bin); the adapter is incomplete")
    try:
        tensors = load_file(file) if file.is_file() else torch.load(old_file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and the unpickler each raise their own types on a torn file
        raise InputError(f"adapter weights in {folder} cannot be read ({str(error).splitlines()[0]})") from None
    return config, {new_name(key): value for key, value in tensors.items()}


def scale_of(config: dict[str, Any]) -> float:
    """Alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def _group(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by module: {module: {lora_A, lora_B[, lora_magnitude_vector]}}."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        match = _PART.match(key)
        if match is None:
            raise InputError(f"adapter in {folder}: tensor '{key}' is not a LoRA or DoRA tensor of a linear layer")
        groups.setdefault(match[1], {})[match[2]] = value
    return groups


def merge_adapter(model: nn.Module, folder: Path) -> int:
    """Fold the adapter in `folder` into `model`'s linear weights, in float32; returns the number of modules changed.

    LoRA: W = W0 + s B A. DoRA: W = diag(m / |W0 + s B A|_rows) (W0 + s B A), with s = alpha / r.

    Raises:
        InputError: a tensor has no module in the model, a part is missing or has the wrong shape.
    """
    import torch

    config, tensors = read_adapter(folder)
    groups, scale, dora = _group(tensors, folder), scale_of(config), bool(config.get("use_dora"))
    if not groups:
        raise InputError(f"adapter in {folder} holds no tensors")
    expected = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    modules = dict(model.named_modules())
    for name, parts in groups.items():
        module = modules.get(name)
        if not isinstance(module, torch.nn.Linear):
            raise InputError(f"adapter in {folder}: module '{name}' does not exist in the backbone; wrong base model?")
        if set(parts) != expected:
            raise InputError(f"adapter in {folder}: module '{name}' has {sorted(parts)}, expected {sorted(expected)}")
        weight = module.weight
        delta_shape = (parts["lora_B"].shape[0], parts["lora_A"].shape[1])
        if delta_shape != tuple(weight.shape):
            raise InputError(
                f"adapter in {folder}: module '{name}' is for a weight of shape {delta_shape}, the backbone has"
                f" {tuple(weight.shape)}; wrong base model?"
            )
        with torch.no_grad():
            parts = {key: value.to(weight.device, torch.float32) for key, value in parts.items()}
            merged = weight.float() + scale * (parts["lora_B"] @ parts["lora_A"])
            if dora:
                magnitude = parts["lora_magnitude_vector"].reshape(-1, 1)
                merged = magnitude / merged.norm(dim=1, keepdim=True) * merged
            weight.copy_(merged.to(weight.dtype))
    return len(groups)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What to attach. Defaults are the released 2B run's (DoRA, r 8, alpha 64, dropout 0.1, gaussian init)."""

    r: int = 8
    alpha: int = 64
    dropout: float = 0.1
    use_dora: bool = True
    init: str = "gaussian"
    target_modules: str | tuple[str, ...] = PAPER_TARGETS


def attach_adapter(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """A trainable `peft.PeftModel` around `model`, adapter parameters in float32, everything else frozen.

    Raises `InputError` if `target_modules` matches nothing.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from b3.model.products import use_onednn, uses_onednn

    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.use_dora,
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        target_modules=targets,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers 5 renamed
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None
    if uses_onednn(wrapped):
        use_onednn(wrapped)  # the adapter's layers too
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for layer, _, dora in _dora_layers(wrapped):
        weight = _whole_weight(layer)
        if weight.dtype != torch.float32:  # peft has rounded the norms, and the student would not start as its backbone
            dora.weight.data = weight.float().norm(dim=1)
    return wrapped


def load_trainable(wrapped: nn.Module, folder: Path) -> None:
    """Copy a saved adapter into an attached one of the same shape. Raises `InputError` on any difference."""
    import torch

    _, tensors = read_adapter(folder)
    groups = _group(tensors, folder)
    parameters = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    seen = set()
    for module, parts in groups.items():
        for part, value in parts.items():
            names = [n for n in parameters if n.startswith(f"base_model.model.{module}.{part}.default")]
            if len(names) != 1 or parameters[names[0]].numel() != value.numel():
                here = tuple(parameters[names[0]].shape) if names else "absent"
                raise InputError(
                    f"the adapter in {folder} does not fit the section adapter: {module}.{part} is {tuple(value.shape)}"
                    f" there and {here} here; copy r, use_dora and target_modules from its adapter_config.json"
                )
            with torch.no_grad():
                parameters[names[0]].copy_(value.reshape(parameters[names[0]].shape))
            seen.add(names[0])
    missing = sorted(set(parameters) - seen)
    if missing:
        raise InputError(f"adapter in {folder} lacks {len(missing)} tensors, first: '{missing[0]}'")


def _dora_layers(module: nn.Module) -> list[tuple[Any, str, Any]]:
    """(adapted layer, name of the adapter, its magnitudes' module) of each linear layer with DoRA."""
    from peft.tuners.lora.dora import DoraLinearLayer

    named = [(m, *item) for m in module.modules() for item in getattr(m, "lora_magnitude_vector", {}).items()]
    return [entry for entry in named if type(entry[2]) is DoraLinearLayer]


def dequantized(layer: Any) -> Tensor:
    """The weight of a frozen linear layer, (out, in)."""
    weight: Tensor = layer.weight
    if hasattr(weight, "quant_state"):
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(layer)
    return weight


def _whole_weight(layer: Any) -> Tensor:
    """The frozen weight of an adapted layer; put together first where it is spread over ranks."""
    weight: Any = dequantized(layer.get_base_layer())
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


def norm_from_factors(layer: Any, name: str) -> Tensor:
    """(out,) float32 row norms of W + s B A: |W|^2 + 2 s <W, B A> + s^2 |B A|^2 by rows, without the matrix B A."""
    import torch

    weight = _whole_weight(layer)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        weight, scale = weight.float(), layer.scaling[name]
        a, b = (part[name].weight.float() for part in (layer.lora_A, layer.lora_B))
        mixed = (b * (weight @ a.T)).sum(dim=1)
        return (weight.square().sum(dim=1) + 2 * scale * mixed + scale**2 * ((b @ (a @ a.T)) * b).sum(dim=1)).sqrt()


def _norm_of_peft(layer: Any, name: str, dora: Any) -> Tensor:
    """The same, computed and rounded as peft does in a forward pass."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    added = dora.get_lora_weight(lora_A=a, lora_B=b).detach()
    weight = _whole_weight(layer).to(added.dtype)
    norm: Tensor = dora.get_weight_norm(weight=weight, lora_weight=added, scaling=layer.scaling[name])
    return norm.detach()


def _forward(
    self: Any, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any,
    base_result: Tensor | None = None, adapter_name: str = "default",
) -> Tensor:  # fmt: skip
    """What DoRA adds to the frozen layer's output (T, out): as peft's `DoraLinearLayer.forward`, with a known norm."""
    from torch.nn.functional import linear

    from b3.model.products import OneDNNLinear, product

    scale = (self.weight / self.known_norm).view(1, -1)
    added = lora_B(lora_A(x))
    if base_result is None:  # dropout has changed the input
        multiply = product if isinstance(base_layer, OneDNNLinear) else linear
        base_result = multiply(x, dequantized(base_layer).to(x.dtype))
    elif base_layer.bias is not None:
        base_result = base_result - base_layer.bias
    total: Tensor = (scale - 1) * base_result + scale * added * scaling
    return total


@contextlib.contextmanager
def norms_once(module: nn.Module, from_factors: bool = False) -> Iterator[None]:
    """Within the context, in which no weight may change, no DoRA layer of `module` computes its norm.

    DoRA divides by the row norms of W + s B A, which its paper takes for constants of the backward pass (arXiv
    2402.09353, section 4.3). They change only with the weights, that is between steps, and are computed on entry; peft
    computes them in every forward pass, with B A as a full matrix. It does not show in long chunks, but in the
    short ones of a cached step it does. from_factors: by `norm_from_factors` instead, whatever autocast is on.
    """
    layers = _dora_layers(module)
    norms = [norm_from_factors(*e[:2]) if from_factors else _norm_of_peft(*e) for e in layers]
    for (_, _, dora), norm in zip(layers, norms, strict=True):
        # A method of the instance shadows the class's until deleted. A compiled layer looks at which it is, not at a
        # step's values: those are an attribute.
        dora.known_norm, dora.forward = norm, MethodType(_forward, dora)
    try:
        yield
    finally:
        for _, _, dora in layers:
            del dora.known_norm, dora.forward


@contextlib.contextmanager
def under_autocast(module: nn.Module) -> Iterator[None]:
    """As `norms_once`, for steps under bfloat16 autocast: inputs and base weights of adapted layers stay as they are.

    peft makes float32 copies of both, which autocast turns back at once: for the same numbers, half of all the memory
    that a chunk moves. The norms then have to be made apart, in float32.
    """
    if not hasattr(module, "peft_config"):
        yield
        return
    from peft.helpers import disable_input_dtype_casting

    with norms_once(module, from_factors=True), disable_input_dtype_casting(module):
        yield
