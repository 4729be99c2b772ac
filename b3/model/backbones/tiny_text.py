"""A tiny random text encoder with a tokenizer trained on given texts: for debug runs and tests, anew from a seed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SPECIAL_TOKENS = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}


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
        positions: rows of the position embedding; RoBERTa uses two less.
        dropout: of hidden states and attention; the real ones have 0.1.
        seed: of the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModel, set_seed

    from b3.model.backbones.tiny import spread_weights

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = _train_tokenizer(texts, folder, vocab_size)
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


def _train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> int:
    """Train a byte-level BPE whose template puts a text between <s> and </s>, save it; returns the number of ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(texts, trainer)
    first, last = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    ends = [(token, raw.token_to_id(token)) for token in (first, last)]
    raw.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL_TOKENS)
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)
