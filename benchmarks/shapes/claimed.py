"""A model of fake tensors that say cuda, and a chunk through both passes of a step; needs the device guard."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from b3.config import Config, load_config
from b3.model.adapter import AdapterSpec, attach_adapter, norms_once, under_autocast
from b3.model.backbones import qwen3_vl as qwen3_vl_file
from b3.model.backbones.qwen_vl import grid_weights
from b3.model.batch import Batch
from b3.model.checkpoint import freeze_matching, unfreeze_all
from b3.model.embedder import Embedder, Kept, Tower
from b3.train.announce import activation_bytes
from b3.train.metrics import tower_flops
from b3.train.vision_cache import is_vision_frozen
from benchmarks.shapes import CHECKPOINTS, FOLDER

warnings.filterwarnings("ignore")
DEVICE = torch.device("cuda", 0)
ROUND = 512  # bytes to which CUDA's allocator rounds
MATRIX = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
NO_TOWER = Tower(0, 0, 0, 0, Kept(0))
GRIDS: list[np.ndarray] = []  # (images, 3) of each chunk made so far
THIN = 240  # operations a byte, below which an H100's memory is slower than its products
FREE = set(
    "detach alias _unsafe_view view t transpose expand slice unsqueeze select squeeze split split_with_sizes empty"
    " empty_like new_empty empty_strided new_empty_strided unbind permute as_strided _reshape_alias lift_fresh".split()
)


class Track(TorchDispatchMode):
    """Bytes of storage that lives on the device, their maximum, and every operation that launches a kernel.

    launches: kind ("gemm", "thin gemm", "attention" or the name) -> [count, operations, bytes read and written].
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, int] = {}
        self.launches: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        outputs = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
        for tensor in outputs:
            if tensor.device.type == "cuda":
                self.hold(tensor)
        if any(t.device.type == "cuda" for t in inputs + outputs):
            self.note(func, args, kwargs, output, inputs, outputs)
        return output

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = -(-storage.nbytes() // ROUND) * ROUND
        self.live += self.seen[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)

    def note(self, func: Any, args: Any, kwargs: Any, output: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func._overloadpacket._qualified_op_name.rpartition("::")[2]
        if func.is_view or name in FREE or not outputs:
            return
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=output) if count is not None else 0
        read = {id(t): t.numel() * t.element_size() for t in inputs if t.device.type == "cuda"}
        written = sum(t.numel() * t.element_size() for t in outputs if t.device.type == "cuda")
        moved = written + (written if name in ("index", "gather", "index_select", "embedding") else sum(read.values()))
        kind = "attention" if "attention" in name or "varlen" in name else name
        if name in MATRIX:
            kind = "gemm" if flops > THIN * moved else "thin gemm"
        entry = self.launches.setdefault(kind, [0, 0.0, 0.0])
        for place, value in enumerate((1, flops, moved)):
            entry[place] += value


@torch.library.custom_op("b3_claimed::silu_backward", mutates_args=())
def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@silu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Silu(torch.autograd.Function):
    """One kernel in each direction, as on a GPU; the meta implementation is made of several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return silu_backward(grad, ctx.saved_tensors[0])


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What a GPU runs for `scaled_dot_product_attention`; a CPU build would take the products apart."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


def prepare() -> None:
    """Where a CPU build would leave the path of a GPU."""
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **options: True
    nn.functional.silu = lambda x, inplace=False: Silu.apply(x)
    nn.functional.scaled_dot_product_attention = fused_attention
    qwen3_vl_file.grid_weights = on_host


def on_host(visual: Any, grids: Tensor) -> dict[str, Any]:
    """`grid_weights` by values, of the chunk's images: the sizes of its results depend on them."""
    with unset_fake_temporarily():
        return grid_weights(visual, torch.from_numpy(GRIDS[-1]))


def to_device(root: nn.Module) -> None:
    """Parameters and buffers of a model on `meta` as fake tensors on the device, shared ones shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                moved[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def fewer(full: Any, layers: int | None, vision_layers: int | None, depth: str) -> None:
    """Take layers from a configuration; depth: what its tower calls their number."""
    text = full.text_config
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:layers]
    if vision_layers is not None:
        setattr(full.vision_config, depth, vision_layers)
    full._attn_implementation = "sdpa"


def qwen2_vl(config: dict[str, Any], layers: int | None, vision_layers: int | None) -> Any:
    """(backbone on meta, a class around it)."""
    import transformers.models.qwen2_vl.modeling_qwen2_vl as upstream
    from transformers import Qwen2VLConfig

    from b3.model.backbones.qwen2_vl import Qwen2VL

    full = Qwen2VLConfig(**config)
    fewer(full, layers, vision_layers, "depth")
    model = upstream.Qwen2VLForConditionalGeneration(full)
    return model, Qwen2VL


def qwen3_5(config: dict[str, Any], layers: int | None, vision_layers: int | None) -> Any:
    import transformers.models.qwen3_5.modeling_qwen3_5 as upstream
    from transformers import Qwen3_5Config

    from b3.model.backbones.qwen3_5 import Qwen3_5

    full = Qwen3_5Config(**config)
    fewer(full, layers, vision_layers, "depth")
    model = upstream.Qwen3_5ForConditionalGeneration(full)
    return model, Qwen3_5


def qwen3_vl(config: dict[str, Any], layers: int | None, vision_layers: int | None) -> Any:
    import transformers.models.qwen3_vl.modeling_qwen3_vl as upstream
    from transformers import Qwen3VLConfig

    from b3.model.backbones.qwen3_vl import Qwen3VL

    full = Qwen3VLConfig(**config)
    if vision_layers is not None:  # all mergers have weights, the first of them runs
        full.vision_config.deepstack_visual_indexes = [0, *full.vision_config.deepstack_visual_indexes[1:]]
    fewer(full, layers, vision_layers, "depth")
    model = upstream.Qwen3VLForConditionalGeneration(full)
    return model, Qwen3VL


def internvl(config: dict[str, Any], layers: int | None, vision_layers: int | None) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    from b3.model.backbones.internvl import InternVL

    full = InternVLConfig(**config)
    fewer(full, layers, vision_layers, "num_hidden_layers")
    model = InternVLForConditionalGeneration(full)
    return model, InternVL


def text_encoder(config: dict[str, Any], layers: int | None, vision_layers: int | None) -> Any:
    from transformers import AutoConfig, AutoModel

    from b3.model.backbones.text_encoder import TextEncoder

    full = AutoConfig.for_model(**config)
    if layers is not None:
        full.num_hidden_layers = layers
    full._attn_implementation = "sdpa"
    model = AutoModel.from_config(full, add_pooling_layer=False)
    return model, TextEncoder


BACKBONES: dict[str, Callable[..., Any]] = {
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "internvl": internvl,
    "roberta": text_encoder,
}


def build(config: Config, layers: int | None, vision_layers: int | None) -> Embedder:
    """As `b3.train.build.build_embedder`, on `meta`, with fewer layers if asked."""
    facts = json.loads((FOLDER / CHECKPOINTS[config.model.name]).read_text())
    is_full, default = config.model.train == "full", torch.get_default_dtype()
    kernel = "sdpa" if config.model.attention == "sdpa" else "varlen"
    with torch.device("meta"):
        torch.set_default_dtype(torch.float32 if is_full or config.model.dtype == "float32" else torch.bfloat16)
        backbone, kind = BACKBONES[facts["model_type"]](facts, layers, vision_layers)
        kind.take_packed(backbone, kernel)
        torch.set_default_dtype(default)
        backbone.requires_grad_(False)
        if is_full:
            unfreeze_all(backbone)
        else:
            spec = config.adapter.model_dump()
            spec["target_modules"] = spec["target_modules"] or kind.adapter_targets
            backbone = attach_adapter(backbone, AdapterSpec(**spec))
    if config.model.freeze:
        freeze_matching(backbone, config.model.freeze)
    if config.model.gradient_checkpointing:
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    processor: Any = SimpleNamespace(side=448, patch=14)  # what the tiles of InternVL are told by
    embedder: Embedder = kind(backbone, processor)
    return embedder.train()


def chunk_of(embedder: Embedder, tokens: int, length: int, grid: tuple[int, int] | None) -> tuple[Batch, Any, Any]:
    """(a chunk of items of one length, patches, grids); with a grid each item shows an image of so many patches."""
    count = max(1, tokens // length)
    lengths = [length] * count
    lengths[0] += tokens - sum(lengths)
    ids = torch.zeros(tokens, dtype=torch.int64).to(DEVICE)
    if grid is None:
        return Batch(ids, lengths), None, None
    patches = grid[0] * grid[1]
    GRIDS.append(np.array([(1, *grid)] * count))
    starts = np.cumsum([0, *lengths[:-1]])
    slots = torch.from_numpy((starts[:, None] + np.arange(patches // 4)).reshape(-1)).to(DEVICE)
    size = embedder.pixels.patch if hasattr(embedder, "pixels") else 14
    pixels = torch.empty(count * patches, 3, size * size, dtype=torch.uint8, device=DEVICE)
    return Batch(ids, lengths, slots=slots), pixels, GRIDS[-1]


def run(
    recipe: str,
    overrides: list[str],
    length: int = 420,
    grid: tuple[int, int] | None = (46, 36),
    layers: int | None = None,
    vision_layers: int | None = None,
) -> dict[str, Any]:
    """Bytes of one rank while it takes a chunk through both passes; the kernels of each part of it.

    recipe, overrides: as of train.py; the chunk has train.chunk_tokens, in items of `length` tokens, each with an image
    of `grid` patches, or None. layers, vision_layers: fewer than the checkpoint's.

    Gives bytes of weights, of gradients and Adam's moments (states), of what a chunk adds: kept after the forward pass
    and at the peak; what the announcement of a run says of the last (told); by part of a step the kernels by kind:
    [count, operations, bytes read and written]; and the operations of text model and tower that count for MFU.
    """
    config = load_config(recipe, overrides)
    tokens = config.train.chunk_tokens
    prepare()
    embedder = build(config, layers, vision_layers)
    track = Track()
    parts: dict[str, dict[str, list[float]]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), track:
        to_device(embedder)
        weights = track.live
        moments = []
        for parameter in (p for p in embedder.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
            moments += [torch.zeros_like(parameter), torch.zeros_like(parameter)]
        held = track.peak = track.live
        batch, patches, grids = chunk_of(embedder, tokens, length, grid)
        with (under_autocast if config.train.bf16 else norms_once)(embedder.backbone):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=config.train.bf16):
                embedder(chunk_of(embedder, 8, 8, None)[0])  # norms are computed by the first chunk of a step
            for name, graph in (("pass 1", False), ("pass 2", True)):
                features = None
                with torch.set_grad_enabled(graph), torch.autocast("cuda", torch.bfloat16, enabled=config.train.bf16):
                    if grid is not None:
                        parts[f"vision, {name}"] = track.launches = {}
                        with torch.set_grad_enabled(graph and not is_vision_frozen(embedder)):
                            features = embedder.features(patches, grids)
                    parts[name] = track.launches = {}
                    vectors = embedder(batch, features=features)
            kept = track.live - held
            parts["backward"] = track.launches = {}
            torch.autograd.backward(vectors, torch.zeros_like(vectors))
        told, cost, is_frozen = activation_bytes(config, embedder, tokens), embedder.cost(), is_vision_frozen(embedder)
    sizes = [] if grid is None else [grid[0] * grid[1]] * len(batch)
    return {
        "weights": weights,
        "states": held - weights,
        "kept": kept,
        "activations": track.peak - held,
        "told": told,
        "parts": parts,
        "text_flops": tower_flops(cost.text, tokens, sum(n * n for n in batch.lengths), backward=True),
        "vision_flops": tower_flops(cost.vision or NO_TOWER, sum(sizes), sum(n * n for n in sizes), not is_frozen),
        "image_tokens": sum(sizes) // 4,
        "vision_frozen": is_frozen,
    }
