"""What the vision-language backbones share: the vector is the last token's final hidden state.

Items are packed end to end without padding and each pools its own last token, so that a vector does not depend on the
rest of its batch. A subclass names upstream's class, its towers, how images become features, and what its text model
takes beside embeddings.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from b3.errors import InputError
from b3.model.attention import Packing, is_bucketed, kernel_arguments, kernel_name, use_packed_attention
from b3.model.batch import Batch
from b3.model.checkpoint import load_tokenizer, load_transformers, write_our_modules
from b3.model.embedder import Cost, Embedder, Kept, Tower, finish, linear_weights
from b3.model.last_layer import keep_last_tokens, keeps_last_tokens
from b3.model.media_processor import MediaProcessor
from b3.model.settings import Settings

# The linear layers of B3's adapters, in the text model alone: elsewhere a tower has layers of the same names.
LANGUAGE_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.down_proj)"


class VisionLanguage(Embedder):
    """An `Embedder` over one of upstream's `...ForConditionalGeneration`.

    It keeps its language head, so that adapter key names are those other software expects, but it is never run.
    """

    reads_images = True
    adapter_targets: ClassVar[tuple[str, ...] | str] = LANGUAGE_TARGETS
    upstream: ClassVar[str]  # name of the class in transformers
    prompts: ClassVar[tuple[str, ...]]  # rules that fit, beside templates
    packed_towers: ClassVar[tuple[str, ...]] = ("language_model",)  # parts of `core` whose sequences are packed

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.pooling not in ("auto", "last"):
            raise InputError(f"pooling '{settings.pooling}' is not for {cls.title}, whose vector is its last token's")
        if settings.prompt not in cls.prompts and "{" not in settings.prompt:
            known = ", ".join(cls.prompts)
            raise InputError(f"prompt '{settings.prompt}' is not for {cls.title}; use one of {known}, or a template")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
        import transformers

        model = load_transformers(getattr(transformers, cls.upstream), folder, dtype, device)
        cls.take_packed(model, attention)
        backbone: nn.Module = model
        return backbone

    @classmethod
    def take_packed(cls, model: Any, attention: str) -> None:
        """Make upstream's model take packed items, and compute what their vectors need alone."""
        use_packed_attention(attention, *(getattr(model.model, name) for name in cls.packed_towers))
        keep_last_tokens(model.model)

    @classmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, settings: Settings) -> Embedder:
        settings = replace(settings, pooling="last")
        processor = cls.make_processor(load_tokenizer(base), backbone.config, settings)
        model = cls(backbone, processor, settings, {"base": str(base), "adapter": adapter and str(adapter)})
        if settings.numerics == "reference":
            model.round_frequencies()
        return model

    @classmethod
    @abstractmethod
    def make_processor(cls, tokenizer: Any, config: Any, settings: Settings) -> MediaProcessor:
        """The processor for a checkpoint with this config. Raises `InputError` if the two do not fit."""

    @abstractmethod
    def vision_cost(self) -> Tower:
        """Of the vision tower, per patch; a token stands for four."""

    def round_frequencies(self) -> None:
        """Round inverse frequencies to bfloat16, as the reference's evaluation does (numerics "reference")."""
        inverse = self.core.language_model.rotary_emb.inv_freq
        inverse.copy_(inverse.to(torch.bfloat16).to(inverse.dtype))

    def layout(self, batch: Batch) -> Packing:
        return Packing.of(batch.lengths, is_bucketed=is_bucketed(self.core.language_model))

    def language_arguments(self, batch: Batch, features: Tensor | None) -> dict[str, Any]:
        """What the text model takes beside embeddings; packing takes the mask's place."""
        return {
            "position_ids": batch.layout.columns[None],
            "attention_mask": dict.fromkeys(("full_attention", "sliding_attention")),
        }

    def save_settings(self, folder: Path) -> None:
        super().save_settings(folder)
        write_our_modules(folder)

    def describe(self) -> str:
        return f"the last token's final hidden state, L2-normalised; positions are `{self.settings.positions}`"

    @property
    def core(self) -> Any:
        """The inner model (`.language_model` and the vision tower) without the language head."""
        backbone: Any = self.backbone
        if hasattr(backbone, "get_base_model"):
            backbone = backbone.get_base_model()
        return backbone.model

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.core.language_model.embed_tokens.weight.dtype
        return dtype

    @property
    def width(self) -> int:
        return int(self.core.language_model.config.hidden_size)

    def attention_kernel(self, autocast: bool) -> str:
        return kernel_name(self.core.language_model, autocast or self.dtype.itemsize == 2)

    def layers(self) -> list[nn.Module]:
        return list(self.core.language_model.layers)

    @abstractmethod
    def vision_layers(self) -> list[nn.Module]:
        """The equal layers of the vision tower."""

    def compiled_layers(self) -> list[nn.Module]:
        return [*self.layers(), *self.vision_layers()]

    def cost(self) -> Cost:
        language = self.core.language_model
        text = language.config
        kept = with_further_adapters(self.kept(), language, text.num_hidden_layers * text.hidden_size)
        pooled = linear_weights(language.layers[-1].mlp) if keeps_last_tokens(language) else (0, 0)
        tower = Tower(
            *linear_weights(language), text.num_hidden_layers, text.hidden_size, kept, causal=True, pooled=pooled
        )
        return Cost(tower, self.vision_cost(), patches=4)

    def kept(self) -> Kept:
        """Of a layer of the text model, with an adapter on the default targets."""
        text = self.core.language_model.config
        ratio = text.intermediate_size / text.hidden_size
        return Kept(5 + 4.2 * ratio, mixed=9, dora=6.8, dropout=0.76 * (4 + ratio))

    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        language, batch = self.core.language_model, self.placed(batch)
        embeds = language.embed_tokens(batch.input_ids)
        if features is None and batch.patches is not None:
            assert batch.grids is not None
            features = self.features(batch.patches, batch.grids)
        if features is not None:
            assert batch.slots is not None
            embeds = embeds.index_copy(0, batch.slots, features[:, : embeds.shape[1]].to(embeds.dtype))
        hidden = language(
            inputs_embeds=embeds[None],
            use_cache=False,
            **self.language_arguments(batch, features),
            **kernel_arguments(batch.layout),
        ).last_hidden_state.squeeze(0)
        if not keeps_last_tokens(language):
            hidden = hidden.index_select(0, batch.layout.boundaries[1:] - 1)
        return finish(hidden, normalize, self.settings.dim)


def with_further_adapters(kept: Kept, language: nn.Module, unit: int) -> Kept:
    """`kept` with what adapters on gate_proj and up_proj add, which are on no backbone's default list.

    LoRA keeps the input that both share, DoRA two outputs of each, dropout a copy of each input and its mask.

    unit: layers times width.
    """
    names = ("gate_proj", "up_proj")
    adapted: list[Any] = [m for name, m in language.named_modules() if name.endswith(names) and hasattr(m, "lora_A")]
    inputs, outputs = (sum(getattr(m, side) for m in adapted) / unit for side in ("in_features", "out_features"))
    return replace(
        kept,
        layer=kept.layer + min(inputs, 1.0),
        dora=kept.dora + 2 * outputs,
        dropout=kept.dropout + 1.5 * inputs,
    )
