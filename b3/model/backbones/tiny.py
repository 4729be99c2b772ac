"""Tiny random models with tokenizers trained on given texts: for debug runs, demos and tests, anew from a seed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
    " <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
TEXT_SPECIAL_TOKENS = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
# Qwen2's pre-tokenisation: contractions, words with their space, single digits, punctuation, line breaks, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = 2048) -> int:
    """Train a byte-level BPE with Qwen2's splitting and special tokens, save it; returns the number of ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)


def make_tiny_model(
    folder: str | Path,
    texts: Iterable[str],
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    vision_layers: int = 2,
    vocab_size: int = 2048,
    embedding_rows: int | None = None,
    seed: int = 0,
) -> Path:
    """Create a random-weight checkpoint in `folder` with the file layout of the real ones.

    Args:
        texts: what the tokenizer is trained on.
        hidden: width of the language model and of the vision tower; a multiple of 4 `heads`.
        vocab_size: of the tokenizer.
        embedding_rows: of the embedding and the language head; default: as many as the tokenizer has ids.
        seed: of the weights.
    """
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, set_seed

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = train_tokenizer(texts, folder, vocab_size)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext")
    }
    half = hidden // heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": embedding_rows or size,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["endoftext"],
        },
        vision_config={
            "depth": vision_layers,
            "embed_dim": hidden,
            "hidden_size": hidden,
            "num_heads": heads,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    state = torch.random.get_rng_state()
    set_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    spread_weights(model)
    torch.random.set_rng_state(state)
    model.save_pretrained(str(folder))
    return folder


def spread_weights(model: nn.Module) -> None:
    """Redraw linear weights with variance 1 / fan-in, and keep token embeddings small.

    All prompts of a task end alike. With the usual 0.02 everywhere the last token's own embedding outweighs what
    attention brings to it, all vectors of a random model are nearly equal, and a short training cannot start.
    """
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                module.weight.normal_(0.0, module.weight[0].numel() ** -0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.02)


def make_tiny_text_model(
    folder: str | Path,
    texts: Iterable[str],
    *,
    kind: str = "roberta",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int = 1024,
    positions: int = 130,
    dropout: float = 0.0,
    seed: int = 0,
) -> Path:
    """Create a random-weight checkpoint in `folder` with the file layout of the real ones.

    Args:
        texts: what the tokenizer is trained on.
        kind: model_type: "bert", "roberta" or "xlm-roberta".
        positions: rows of the position embedding; RoBERTa uses that number minus two.
        dropout: of hidden states and attention; the real ones have 0.1.
        seed: of the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModel, set_seed

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = _train_text_tokenizer(texts, folder, vocab_size)
    config = AutoConfig.for_model(
        kind,
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        type_vocab_size=1 if "roberta" in kind else 2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    state = torch.random.get_rng_state()
    set_seed(seed)
    model = AutoModel.from_config(config, add_pooling_layer=False)
    spread_weights(model)
    torch.random.set_rng_state(state)
    model.save_pretrained(str(folder))
    return folder


def _train_text_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> int:
    """Train a byte-level BPE whose template puts a text between <s> and </s>, save it; returns the number of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=TEXT_SPECIAL_TOKENS["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(TEXT_SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    first, last = TEXT_SPECIAL_TOKENS["cls_token"], TEXT_SPECIAL_TOKENS["sep_token"]
    ends = [(token, raw.token_to_id(token)) for token in (first, last)]
    raw.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **TEXT_SPECIAL_TOKENS)
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)
