r"""Text encoders (BERT, RoBERTa, XLM-RoBERTa) as embedders: mean or first-token pooling, bidirectional attention.

    model = Embedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    vectors = model.encode(["a cat", "a dog"])

Vectors equal those of the upstream model run on one text at a time. Pooling and the longest text are those of the
checkpoint's sentence-transformers files, if it has them; what is saved has them too, so that sentence-transformers
loads it and gives the same vectors. Texts are taken as they are, with the special tokens of the tokenizer's template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from b3.data.items import Item
from b3.errors import DataError, InputError
from b3.files import write_json
from b3.model.attention import Packing, is_bucketed, kernel_arguments, kernel_name, use_packed_attention
from b3.model.backbones.tiny import make_tiny_text_model
from b3.model.batch import Batch, Grid, Processor, Tokens
from b3.model.checkpoint import (
    MODULES_FILE,
    SETTINGS_FILE,
    load_tokenizer,
    load_transformers,
    read_json,
    read_modules,
    write_modules,
    write_our_modules,
)
from b3.model.embedder import Cost, Embedder, Kept, Tower, finish, linear_weights
from b3.model.settings import Settings

POOLING_FILE = "1_Pooling/config.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
# pooling_mode of sentence-transformers, as one name or as the switches that it wrote before version 6
MODES = {"mean": "mean", "cls": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
DENSE = "2_Dense"  # cuts vectors: sentence-transformers itself cuts only behind the last module


@dataclass(frozen=True)
class TextProcessor(Processor):
    """Texts to tokens, special tokens included; a longer text is cut before its last special token.

    Args:
        tokenizer: a fast tokenizer of the backbone.
        max_length: tokens of the longest text. None: no limit.
    """

    tokenizer: Any
    max_length: int | None = None

    def check(self, item: Item) -> None:
        if item.media or item.instruction:
            what = "images or videos" if item.media else "instructions"
            raise DataError(f"{item.describe()}: the backbone is a text encoder and reads no {what}; drop the row")

    def tokens(self, item: Item, grids: Sequence[Grid]) -> Tokens:
        return Tokens.of_text(self._ids(item))

    def _ids(self, item: Item) -> np.ndarray:
        encoded = self.tokenizer.backend_tokenizer.encode(item.text or "", add_special_tokens=True)
        ids, special = np.asarray(encoded.ids, dtype=np.int64), np.asarray(encoded.special_tokens_mask, dtype=bool)
        if special.all():
            raise DataError(f"{item.describe()}: an item needs a text")
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        tail = len(ids) - 1 - int(np.flatnonzero(~special)[-1])
        return np.concatenate([ids[: self.max_length - tail], ids[len(ids) - tail :]])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and the longest text."""
        self.tokenizer.save_pretrained(str(folder))
        write_json(Path(folder) / TRANSFORMER_FILE, {"max_seq_length": self.max_length, "do_lower_case": False})


class TextEncoder(Embedder):
    """An `Embedder` over upstream's bare `BertModel`, `RobertaModel` or `XLMRobertaModel`, without head and pooler.

    Pooling is "mean" over all tokens, or "cls", the first.
    """

    processor: TextProcessor
    title = "a text encoder"
    setting_names: ClassVar[tuple[str, ...]] = ("max_length", "pooling")
    adapter_targets: ClassVar[tuple[str, ...]] = ("query", "key", "value", "dense")  # all linear layers

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        super().check_settings(settings)
        if settings.pooling == "last":
            raise InputError("pooling 'last' is not for text encoders; use auto, mean or cls")
        if settings.prompt != "plain":
            raise InputError(f"prompt '{settings.prompt}' is not for text encoders, which read the text; leave it out")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
        from transformers import AutoModel

        model = load_transformers(AutoModel, folder, dtype, device, add_pooling_layer=False)
        cls.take_packed(model, attention)
        backbone: nn.Module = model
        return backbone

    @classmethod
    def take_packed(cls, model: Any, attention: str) -> None:
        """Make upstream's model take packed texts."""
        use_packed_attention(attention, model)

    @classmethod
    def build(cls, backbone: nn.Module, base: Path, adapter: Path | None, settings: Settings) -> TextEncoder:
        folders = [base] if adapter is None else [adapter, base]
        config: Any = backbone.config
        longest = config.max_position_embeddings - first_position(config)
        length = settings.max_length
        if length is not None and not 3 <= length <= longest:
            raise InputError(f"max_length {length} does not fit {base}: it must be from 3 to {longest} tokens")
        if length is None:
            length = min(saved_length(folders) or longest, longest)
        pooling = saved_pooling(folders) or "mean" if settings.pooling == "auto" else settings.pooling
        settings = replace(settings, max_length=length, pooling=pooling)
        source = {"base": str(base), "adapter": adapter and str(adapter)}
        return cls(backbone, TextProcessor(load_tokenizer(base), length), settings, source)

    @classmethod
    def tiny(cls, folder: Path, texts: Iterable[str], seed: int = 0) -> Path:
        return make_tiny_text_model(folder, texts, hidden=32, vocab_size=512, dropout=0.1, seed=seed)

    @property
    def core(self) -> Any:
        """Upstream's model, without peft's wrapper."""
        backbone: Any = self.backbone
        return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.core.get_input_embeddings().weight.dtype
        return dtype

    @property
    def width(self) -> int:
        return int(self.core.config.hidden_size)

    def attention_kernel(self, autocast: bool) -> str:
        return kernel_name(self.core, autocast or self.dtype.itemsize == 2)

    def cost(self) -> Cost:
        text = self.core.config
        ratio = text.intermediate_size / text.hidden_size
        kept = Kept(
            9 + 2 * ratio + 2 * (text.hidden_dropout_prob > 0),
            mixed=4,
            dora=7 + 8 * ratio,
            dropout=1.25 * (5 + ratio),
        )
        return Cost(Tower(*linear_weights(self.core), text.num_hidden_layers, text.hidden_size, kept))

    def describe(self) -> str:
        of = {"mean": "the mean of all tokens' final hidden states", "cls": "the first token's final hidden state"}
        return f"{of[self.settings.pooling]}, L2-normalised; texts are cut to {self.processor.max_length} tokens"

    def layout(self, batch: Batch) -> Packing:
        return Packing.of(batch.lengths, causal=False, is_bucketed=is_bucketed(self.core))

    def forward(self, batch: Batch, normalize: bool = True, features: Tensor | None = None) -> Tensor:
        """Vectors (B, D) float32 of a batch of texts, L2-normalised if asked. `features` must be None."""
        assert features is None and batch.patches is None, "a text encoder reads no images"
        core, batch = self.core, self.placed(batch)
        ids, packing = batch.input_ids[None], batch.layout
        hidden = core(
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            position_ids=packing.columns[None] + first_position(core.config),
            **kernel_arguments(packing),
        ).last_hidden_state[0]
        starts = packing.boundaries.long()
        if self.settings.pooling == "cls":
            return finish(hidden.index_select(0, starts[:-1]), normalize, self.settings.dim)
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        return finish(torch.segment_reduce(hidden, "mean", offsets=starts, axis=0), normalize, self.settings.dim)

    def save_settings(self, folder: Path) -> None:
        """Write tokenizer, longest text, pooling and cut in the layout of sentence-transformers."""
        super().save_settings(folder)
        switches = {
            name: mode == self.settings.pooling for name, mode in MODES.items() if name.startswith("pooling_mode")
        }
        write_json(folder / POOLING_FILE, {"word_embedding_dimension": self.width, **switches})
        if hasattr(self.backbone, "get_base_model"):  # transformers refuses an adapter beside the config of its base
            write_our_modules(folder)
            return
        cut = [(DENSE, "sentence_transformers.models.Dense")] if self.dim < self.width else []
        if cut:
            write_cut(folder / DENSE, self.width, self.dim)
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        first, pooling, last = ((path, f"sentence_transformers.models.{kind}") for path, kind in kinds)
        write_modules(folder, first, pooling, *cut, last)


def write_cut(folder: Path, width: int, dim: int) -> None:
    """The first `dim` of `width` numbers, as a linear layer of sentence-transformers (an identity's first rows)."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    identity = "torch.nn.modules.linear.Identity"
    shape = {"in_features": width, "out_features": dim, "bias": False, "activation_function": identity}
    write_json(folder / "config.json", shape)
    save_file({"linear.weight": torch.eye(dim, width)}, folder / "model.safetensors")


def first_position(config: Any) -> int:
    """The position of a text's first token: RoBERTa counts from behind its padding index."""
    return 0 if config.model_type == "bert" else int(config.pad_token_id) + 1


def saved_length(folders: list[Path]) -> int | None:
    """Tokens of the longest text by the sentence-transformers file of the first folder that has one.

    Raises `InputError` if the file asks for lower case, which is left to tokenizers.
    """
    for file in (folder / TRANSFORMER_FILE for folder in folders):
        if file.is_file():
            facts = read_json(file)
            if facts.get("do_lower_case"):
                raise InputError(f"{file}: do_lower_case is not supported; set it false and use a tokenizer that does")
            return facts.get("max_seq_length")
    return None


def saved_pooling(folders: list[Path]) -> str | None:
    """The pooling by the sentence-transformers files of the first folder that has them.

    Raises `InputError` if they ask for what this class does not do.
    """
    for folder in folders:
        known = {"Transformer", "Pooling", "Normalize", "EmbedderModule"}
        if (folder / SETTINGS_FILE).is_file() and "dim" in read_json(folder / SETTINGS_FILE):
            known.add("Dense")  # ours, which cuts
        other = sorted({str(m.get("type")).rpartition(".")[2] for m in read_modules(folder)} - known)
        if other:
            raise InputError(
                f"{folder / MODULES_FILE}: the module {other[0]} behind the encoder is not supported; as a teacher"
                f" take st:{folder}, to train without it give pooling mean or cls"
            )
        file = folder / POOLING_FILE
        if file.is_file():
            facts = read_json(file)
            modes = facts.get("pooling_mode") or [k for k, on in facts.items() if k.startswith("pooling_mode") and on]
            names = [modes] if isinstance(modes, str) else list(modes)
            if len(names) != 1 or names[0] not in MODES:
                raise InputError(f"{file}: pooling {' + '.join(names) or 'none'} is not supported; give mean or cls")
            return MODES[names[0]]
    return None
