"""Tiny random models with tokenizers trained on given texts: for debug runs, demos and tests, anew from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Create a random-weight Qwen2-VL in `folder` with the file layout of the real ones.

    Args:
        texts: what the tokenizer is trained on.
        hidden: width of the language model and of the vision tower; a multiple of 4 `heads`.
        vocab_size: of the tokenizer.
        embedding_rows: of the embedding and the language head; default: as many as the tokenizer has ids.
        seed: of the weights.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = _train_tokenizer(texts, vocab_size)
    half = hidden // heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    text = _text_config(tokenizer, hidden, layers, heads) | {
        "vocab_size": embedding_rows or len(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    }
    size = {"depth": vision_layers, "embed_dim": hidden, "hidden_size": hidden, "num_heads": heads, "mlp_ratio": 2}
    vision = size | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_media_tokens(tokenizer))
    return _write(folder, tokenizer, lambda: Qwen2VLForConditionalGeneration(config), seed)


def make_tiny_qwen(folder: str | Path, texts: Iterable[str], kind: str, text: Any, vision: Any, seed: int = 0) -> Path:
    """Create a random-weight model of the Qwen-VL family in `folder`: width 32, two layers, one vision layer.

    Args:
        texts: what the tokenizer is trained on.
        kind: model_type.
        text, vision: what its configuration says beside the common sizes.
        seed: of the weights.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = _train_tokenizer(texts, 512)
    base = _text_config(tokenizer, 32, 2, 4) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    steps = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    config = AutoConfig.for_model(
        kind,
        text_config=base | text,
        vision_config=sizes | steps | vision,
        tie_word_embeddings=True,
        **_media_tokens(tokenizer),
    )
    return _write(folder, tokenizer, lambda: AutoModelForImageTextToText.from_config(config), seed)


def make_tiny_internvl(folder: str | Path, texts: Iterable[str], seed: int = 0) -> Path:
    """Create a random-weight InternVL in `folder`: tiles of 56 pixels, four tokens each."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    tokenizer = _train_tokenizer(texts, 512, [*SPECIAL_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>"])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = InternVLConfig(
        text_config=_text_config(tokenizer, 32, 2, 4) | {"model_type": "qwen2"},
        vision_config=size | {"image_size": [56, 56], "patch_size": [14, 14], "use_mean_pooling": True},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return _write(folder, tokenizer, lambda: InternVLForConditionalGeneration(config), seed)


def _text_config(tokenizer: Any, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _media_tokens(tokenizer: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


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
    """Create a random-weight text encoder in `folder` with the file layout of the real ones.

    Args:
        texts: what the tokenizer is trained on.
        kind: model_type: "bert", "roberta" or "xlm-roberta".
        positions: rows of the position embedding; RoBERTa uses that number minus two.
        dropout: of hidden states and attention; the real ones have 0.1.
        seed: of the weights.
    """
    from transformers import AutoConfig, AutoModel

    tokenizer = _train_text_tokenizer(texts, vocab_size)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
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
    return _write(folder, tokenizer, lambda: AutoModel.from_config(config, add_pooling_layer=False), seed)


def _write(folder: str | Path, tokenizer: Any, build: Callable[[], Any], seed: int) -> Path:
    """Save a tokenizer and the model that `build` makes, its weights drawn from `seed`."""
    import torch
    from transformers import set_seed

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    state = torch.random.get_rng_state()
    set_seed(seed)
    model = build()
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
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv3d)):
                module.weight.normal_(0.0, module.weight[0].numel() ** -0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.02)


def _train_tokenizer(texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIAL_TOKENS) -> Any:
    """A byte-level BPE with Qwen2's splitting and special tokens, trained on `texts`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    _train_bytes(raw, texts, vocab_size=vocab_size - len(special))
    end = SPECIAL_TOKENS[0]
    tokenizer = Qwen2Tokenizer(tokenizer_object=raw, eos_token=end, pad_token=end, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE whose template puts a text between <s> and </s>, trained on `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=TEXT_SPECIAL_TOKENS["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train_bytes(raw, texts, vocab_size=vocab_size, special_tokens=list(TEXT_SPECIAL_TOKENS.values()))
    first, last = TEXT_SPECIAL_TOKENS["cls_token"], TEXT_SPECIAL_TOKENS["sep_token"]
    ends = [(token, raw.token_to_id(token)) for token in (first, last)]
    raw.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **TEXT_SPECIAL_TOKENS)


def _train_bytes(raw: Any, texts: Iterable[str], **options: Any) -> None:
    """Learn the merges of a BPE over bytes; `options` of its trainer."""
    from tokenizers import decoders, pre_tokenizers, trainers

    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet, **options))
