r"""The embedding model: a backbone, pooling, L2 normalisation.

    from b3 import Embedder
    model = Embedder.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", adapter="runs/b3")
    vectors = model.encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": "cat.png"}, "a cat"])

A backbone is a subclass in a file of `b3/model/backbones/` and a line in `b3.registry.BACKBONES`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize

from b3 import registry
from b3.data.items import Item, as_item
from b3.errors import InputError
from b3.model import adapter as adapters
from b3.model.attention import choose_attention
from b3.model.batch import Batch, Processor, upload
from b3.model.checkpoint import choose_device, choose_dtype, fetch, model_type, read_json
from b3.model.products import uses_onednn
from b3.model.settings import Settings, resolve_settings


@dataclass(frozen=True, slots=True)
class Kept:
    """Numbers that a layer keeps for the backward pass, per token and unit of width, as the shapes of a GPU tell.

    mixed: more of them where float32 weights run under autocast. dora, dropout: what those of the adapter add.
    outside: kept once, before and after the layers. (benchmarks/shapes; tests/gpu/test_memory.py holds them to it.)
    """

    layer: float
    mixed: float = 0.0
    dora: float = 0.0
    dropout: float = 0.0
    outside: float = 5.0


@dataclass(frozen=True, slots=True)
class Tower:
    """What decides the operations and the memory of one part of a model.

    weights: those of linear layers that a token (or patch) passes. trained: those of them that are trained.
    layers, width: number of equal layers, and numbers of a token between two of them.
    causal: whether a token sees only those before it. full_attention: the width of attention over whole sequences,
    summed over the layers that have it; None: layers times width.
    pooled: (weights, trained) of those that only the last token of an item passes.
    """

    weights: int
    trained: int
    layers: int
    width: int
    kept: Kept
    causal: bool = False
    full_attention: int | None = None
    pooled: tuple[int, int] = (0, 0)

    @property
    def depth(self) -> float:
        """Layers that all tokens pass, the last one for its share of weights that are not `pooled`."""
        return self.layers * (1 - self.pooled[0] / max(1, self.weights))

    @property
    def attention(self) -> int:
        """What the operations of attention grow with."""
        return self.layers * self.width if self.full_attention is None else self.full_attention


@dataclass(frozen=True, slots=True)
class Cost:
    """Numbers from which the operations and the memory of a training step follow.

    text, vision: the two towers; vision is None where no images are read.
    patches: of an image or a video, per token that it takes in the text.
    """

    text: Tower
    vision: Tower | None = None
    patches: int = 0


class Embedder(nn.Module):
    """Turns items into vectors. Build one with `from_pretrained`; `forward` is differentiable, `encode` is not.

    Args:
        backbone: upstream's model, bare or wrapped by peft.
        processor: how items become inputs; must belong to the backbone.
        settings: what else decides a vector, as the processor and the backbone were built with.
        source: description of where the weights came from, for manifests and model cards.
    """

    title: ClassVar[str]  # in messages: "a text encoder"
    reads_images: ClassVar[bool] = False
    setting_names: ClassVar[tuple[str, ...]] = ()  # fields of `Settings` that mean something here
    adapter_targets: ClassVar[tuple[str, ...] | str] = ()  # suffixes of linear layers, or a regular expression of
    # their names; (): an adapter is refused

    def __init__(
        self,
        backbone: nn.Module,
        processor: Processor,
        settings: Settings | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.settings = settings or Settings()
        self.source = source or {}
        self.execution = "eager"  # how the layers run, for people

    @staticmethod
    def from_pretrained(
        name: str | Path,
        adapter: str | Path | None = None,
        dtype: str = "bfloat16",
        device: str | torch.device | None = None,
        attention: str = "auto",
        **settings: Any,
    ) -> Embedder:
        """Load a checkpoint, merging the adapter (if any) into its weights in float32.

        Args:
            name: hub name or folder of a full model, or of an adapter repository (its base is then loaded too).
            adapter: folder or hub name of a LoRA/DoRA adapter to merge on top of `name`.
            dtype: "float32", "bfloat16", or "auto" (bfloat16 on a GPU).
            device: None means the GPU of the local rank if there is one, else the CPU.
            attention: "auto", "varlen" or "sdpa"; see `b3.model.attention`.
            settings: fields of `Settings`; each replaces what b3_settings.json of the adapter, or else of the base,
                says, else what is known of a published checkpoint, else what the prompt rule expects; "auto" leaves it.
                `prompt` may be a .jinja file.

        Raises:
            InputError: the checkpoint or the adapter is missing, incomplete or of another architecture, or a value of
                a setting is not for it.
        """
        base, adapter_folder = locate(name, adapter)
        kind = backbone_class(base)
        if adapter_folder is not None:
            if not kind.adapter_targets:
                raise InputError(
                    f"the model in {base} takes no adapter, {adapter_folder} would count for nothing; leave it out"
                )
            adapters.check_backbone(adapter_folder, base)
        merged = resolve_settings(adapter if adapter is not None else name, settings, adapter_folder, base)
        kind.check_settings(merged)
        target = choose_device(device)
        torch_dtype = choose_dtype(dtype, target)
        backbone = kind.load(base, torch_dtype, target, choose_attention(attention, target))
        if adapter_folder is not None:
            adapters.merge_adapter(backbone, adapter_folder)
        model = kind.build(backbone, base, adapter_folder, merged)
        if merged.dim is not None and merged.dim > model.width:
            raise InputError(f"dim {merged.dim} exceeds the {model.width} numbers of a vector of {base}; lower it")
        return model

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """Say which settings change nothing for this kind of model. Raises `InputError` for a value it cannot take."""
        settings.note_unused(cls.setting_names, cls.title)

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
        """The backbone in `folder`, in eval mode, parameters frozen. Raises `InputError` if it lacks anything."""

    @classmethod
    @abstractmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, settings: Settings) -> Embedder:
        """The model around a loaded backbone, with what else its folders hold."""

    @classmethod
    @abstractmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        """Write a random checkpoint of this kind that a CPU trains in seconds, its tokenizer made from `texts`."""

    @abstractmethod
    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        """Vectors (B, D) float32 of a batch, cut to `dim` and L2-normalised if asked (`finish` does both).

        `features` (S, F), if given, stand for the media in place of `batch.patches`. A batch without layout is
        `placed` first.
        """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the activations."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Length of a vector before it is cut."""

    @property
    def dim(self) -> int:
        """Length of a vector: that of the settings, else the whole width."""
        return self.settings.dim or self.width

    @property
    def numerics(self) -> str:
        """What else decides the last bits of a vector: for caches, which must not mix two of them."""
        products = ", products oneDNN" if self.multiplies_by_onednn else ""
        return f"{self.dtype} on {self.device.type}, attention {self.attention_kernel(autocast=False)}{products}"

    @property
    def multiplies_by_onednn(self) -> bool:
        """Whether it has layers whose float32 products on a CPU are oneDNN's."""
        return self.device.type == "cpu" and uses_onednn(self.backbone)

    @abstractmethod
    def cost(self) -> Cost:
        """What operations and memory of a step follow from; depends on which parameters are trained."""

    @abstractmethod
    def describe(self) -> str:
        """How a vector is made, in words."""

    @property
    def vision(self) -> nn.Module | None:
        """The part that reads images; None if there is none."""
        return None

    def features(self, patches: Tensor, grids: np.ndarray) -> Tensor:
        """What the text model sees of images and videos: (S, F), a row for each of their tokens, in order.

        F is the width of the text model, or a multiple of it where a backbone feeds several layers.

        Args:
            patches: (P, C, n) uint8 of all media, on the host or this device, as the processor makes them.
            grids: (media, 3) int64, as in `Batch`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no images")

    def attention_kernel(self, autocast: bool) -> str:
        """What computes attention in training, for people; autocast: under bfloat16 autocast."""
        return "the backbone's own"

    def layout(self, batch: Batch) -> Any:
        """What else a forward pass needs to know of a batch on the host, so that no layer has to ask the device."""
        return ()

    def placed(self, batch: Batch) -> Batch:
        """A batch with its layout, on this device."""
        if batch.layout is not None:
            return batch
        return upload(replace(batch, layout=self.layout(batch)), self.device)

    def layers(self) -> list[nn.Module]:
        """The layers whose frozen weights may be spread over ranks, in the order in which they run."""
        return []

    def with_settings(self, **changes: Any) -> Embedder:
        """The same weights under other settings; they must leave the backbone as it is (image budget, prompt, ...)."""
        other = copy.copy(self)
        other.settings = replace(self.settings, **changes)
        processor: Any = self.processor
        other.processor = replace(processor, settings=other.settings)
        return other

    def compiled_layers(self) -> list[nn.Module]:
        """The layers that `model.compile` compiles: the text model's and the vision tower's."""
        return self.layers()

    @property
    def has_dropout(self) -> bool:
        """Whether training drops activations at random, in the backbone or the adapter."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def load_weights(self, folder: Path) -> None:
        """Copy all weights of a checkpoint of the same shape. Raises `InputError` if it is missing or incomplete."""
        saved = self.load(folder, torch.float32, torch.device("cpu"), "sdpa")
        self.backbone.load_state_dict(saved.state_dict())

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `from_pretrained` and others load: weights with `save_settings`.

        With an adapter attached only that, in peft's layout, and the config of its base.
        """
        folder.mkdir(parents=True, exist_ok=True)
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            card = folder / "README.md"
            text = card.read_bytes() if card.exists() else None
            for config in backbone.peft_config.values():
                if isinstance(config.target_modules, set):  # its order is another in each process
                    config.target_modules = sorted(config.target_modules)
            backbone.save_pretrained(str(folder), save_embedding_layers=False)
            card.unlink(missing_ok=True)  # peft's empty model card
            if text is not None:
                card.write_bytes(text)
            backbone.get_base_model().config.save_pretrained(str(folder))
        else:
            backbone.save_pretrained(str(folder))
        self.save_settings(folder)

    def save_settings(self, folder: Path) -> None:
        """Write what `from_pretrained` and others read beside the weights: tokenizer, settings."""
        self.processor.save_pretrained(folder)
        self.settings.save(folder, self.setting_names)

    def encode(
        self,
        items: Sequence[Item | dict[str, Any] | str],
        normalize: bool = True,
        batch_tokens: int | None = None,
        max_items: int | None = None,
        workers: int = 0,
        progress: str | None = None,
    ) -> np.ndarray:
        """Vectors (N, D) float32 in the order of `items`; L2-normalised in float32 if asked.

        Args:
            items: as `b3.data.items.as_item` takes them.
            batch_tokens, max_items, workers: as in `b3.model.encode.Encoder`.
            progress: label of a bar; None: no bar.

        Raises:
            DataError: an item is empty, or its image is missing, does not decode or lacks its token.
        """
        from b3.model.encode import Encoder, unit

        encoder = Encoder(self, batch_tokens, max_items, workers)
        vectors = encoder.encode([as_item(item) for item in items], progress)
        return unit(vectors) if normalize else vectors


def finish(pooled: Tensor, normalize: bool, dim: int | None = None) -> Tensor:
    """Pooled states (B, D) in float32 (float64 stays), cut to the first `dim`, L2-normalised if asked."""
    pooled = pooled if dim is None else pooled[:, :dim]
    pooled = pooled if pooled.dtype == torch.float64 else pooled.float()
    return l2_normalize(pooled, dim=-1) if normalize else pooled


def linear_weights(module: nn.Module) -> tuple[int, int]:
    """(weights of linear and convolution layers, those of them that are trained)."""
    weights = trained = 0
    seen: set[int] = set()
    for part in module.modules():
        weight: Any = getattr(part, "weight", None)
        if isinstance(part, (nn.Linear, nn.Conv3d)) and id(weight) not in seen:
            seen.add(id(weight))
            size = part.in_features * part.out_features if isinstance(part, nn.Linear) else weight.numel()
            weights += size  # of one in 4 bit too
            trained += size if weight.requires_grad else 0
    return weights, trained


def locate(name: str | Path, adapter: str | Path | None = None) -> tuple[Path, Path | None]:
    """(folder of the base model, folder of the adapter or None); an adapter repository alone names its base."""
    folder = fetch(name)
    if adapter is not None:
        return folder, fetch(adapter)
    if adapters.is_adapter(folder):
        return fetch(read_json(folder / adapters.CONFIG_FILE)["base_model_name_or_path"]), folder
    return folder, None


def backbone_class(base: Path) -> type[Embedder]:
    """The backbone for the checkpoint in `base`, by its model_type. Raises `InputError` listing the known ones."""
    kind = model_type(base)
    if kind not in registry.BACKBONES:
        raise InputError(
            f"{base}/config.json has model_type '{kind}'; supported: {', '.join(registry.BACKBONES)}; another is a file"
            f" in b3/model/backbones and a line '{kind}': ... in b3/registry.py (docs/backbones.md)"
        )
    loaded: type[Embedder] = registry.load("backbone", kind)
    return loaded
