"""Text encoders: upstream's vectors one text at a time, whatever else is in the batch; what is saved and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from b3 import Embedder
from b3.data.items import Item
from b3.errors import DataError, InputError
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.backbones.text_encoder import TextEncoder

KINDS = ("bert", "roberta", "xlm-roberta")
# 20 distinct lengths, and several texts of one length
TEXTS = [" ".join(["a red disc number"] * (1 + i % 20)) + f" {i}" for i in range(60)] + ["a", "what is <pad in here?"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_model(tmp_path_factory.mktemp("text") / request.param, request.param)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_model(tmp_path_factory.mktemp("text") / "roberta")


def upstream(folder: Path, texts: list[str], pooling: str, **options: object) -> np.ndarray:
    """Upstream's own attention, tokenizer call and positions, a text at a time."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt", **options)).last_hidden_state[0]
            rows.append(normalize(hidden[0] if pooling == "cls" else hidden.mean(dim=0), dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_upstreams_one_by_one(folder: Path, pooling: str) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32", pooling=pooling)
    assert isinstance(model, TextEncoder) and model.dim == 64
    ours = model.encode(TEXTS)
    assert np.abs(ours - upstream(folder, TEXTS, pooling)).max() < 2e-6
    assert np.abs(ours[0] - ours[1]).max() > 1e-3  # the bound above says something


def test_a_vector_does_not_depend_on_its_batch(folder: Path) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32")
    together, apart = model.encode(TEXTS), model.encode(TEXTS, max_items=1)
    assert np.abs(together - apart).max() < 2e-6


def test_gradients_are_upstreams(roberta: Path) -> None:
    """Through padded buckets: what lies in the padding gets no gradient and gives none."""
    from b3.model.batch import collate

    model = Embedder.from_pretrained(roberta, dtype="float32")
    model.backbone.requires_grad_(True)
    theirs = AutoModel.from_pretrained(roberta, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer, texts = AutoTokenizer.from_pretrained(roberta), TEXTS[:12]
    weights = torch.randn(len(texts), model.dim, generator=torch.Generator().manual_seed(0))
    (model(collate([model.processor(Item(text)) for text in texts])) * weights).sum().backward()
    for text, weight in zip(texts, weights, strict=True):
        hidden = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        (normalize(hidden.mean(dim=0), dim=0) * weight).sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("key.bias"):
            continue  # its gradient is zero, a rounding error of the softmax apart
        assert (parameter.grad - expected[name]).norm() < 1e-5 * expected[name].norm() + 1e-7, name


def test_tokens_are_the_tokenizers(folder: Path) -> None:
    processor = Embedder.from_pretrained(folder, dtype="float32").processor
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "</s> in the middle </s> ", " ends with spaces  "):
        assert processor(Item(text)).input_ids.tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("length", [3, 8, 20])
def test_a_long_text_is_cut_before_its_last_special_token(folder: Path, length: int) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32", max_length=length)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        assert model.processor(Item(text)).input_ids.tolist() == expected
        assert model.processor.measure(Item(text))[1] == len(expected)


def test_the_longest_text_is_what_the_model_has_positions_for(folder: Path) -> None:
    model = Embedder.from_pretrained(folder, dtype="float32")
    limit = 130 if folder.name == "bert" else 128
    assert len(model.processor(Item("red " * 500)).input_ids) == limit == model.processor.max_length
    expected = upstream(folder, ["red " * 500], "mean", truncation=True, max_length=limit)
    assert np.abs(model.encode(["red " * 500]) - expected).max() < 2e-6
    with pytest.raises(InputError, match=f"from 3 to {limit} tokens"):
        Embedder.from_pretrained(folder, dtype="float32", max_length=limit + 1)


SWITCHES = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}


@pytest.mark.parametrize(
    ("written", "pooling"),
    [
        ({**SWITCHES, "pooling_mode_cls_token": True}, "cls"),
        ({**SWITCHES, "pooling_mode_mean_tokens": True}, "mean"),
        ({"embedding_dimension": 64, "pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_and_length_are_the_checkpoints(roberta: Path, tmp_path: Path, written: dict, pooling: str) -> None:
    folder = Path(shutil.copytree(roberta, tmp_path / "model"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(written))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    model = Embedder.from_pretrained(folder, dtype="float32")
    assert (model.settings.pooling, model.processor.max_length) == (pooling, 16)
    given = Embedder.from_pretrained(folder, dtype="float32", pooling="mean", max_length=24)
    assert (given.settings.pooling, given.processor.max_length) == ("mean", 24)


def test_sentence_transformers_gives_the_same_vectors(folder: Path, tmp_path: Path) -> None:
    """From what we save, with its own padding and masks, and texts that are cut."""
    library = pytest.importorskip("sentence_transformers", reason="pip install 'b3[st]' runs this test")

    model = Embedder.from_pretrained(folder, dtype="float32", pooling="cls", max_length=40)
    model.save(tmp_path / "saved")
    theirs = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS)
    assert np.abs(model.encode(TEXTS) - theirs).max() < 2e-6
    again = Embedder.from_pretrained(tmp_path / "saved", dtype="float32")
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_on_all_linear_layers_saved_and_merged(roberta: Path, tmp_path: Path, dora: bool) -> None:
    model = Embedder.from_pretrained(roberta, dtype="float32", pooling="cls")
    linear = sorted(n for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear))
    spec = AdapterSpec(r=4, dropout=0.0, use_dora=dora, target_modules=model.adapter_targets)
    plain = model.encode(TEXTS)
    model.backbone = attach_adapter(model.backbone, spec)
    assert tiny.matched_modules(model.backbone) == linear and len(linear) == 12
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    attached = model.encode(TEXTS)
    assert np.abs(attached - plain).max() > 1e-3
    model.save(tmp_path / "adapter")
    for merged in (
        Embedder.from_pretrained(roberta, adapter=tmp_path / "adapter", dtype="float32"),
        Embedder.from_pretrained(tmp_path / "adapter", dtype="float32"),
    ):
        assert merged.settings.pooling == "cls"
        assert np.abs(merged.encode(TEXTS) - attached).max() < 2e-6


def test_images_and_empty_texts_are_refused(roberta: Path) -> None:
    from PIL import Image

    model = Embedder.from_pretrained(roberta, dtype="float32")
    with pytest.raises(DataError, match="text encoder and reads no images"):
        model.encode([Item("<|image_1|>\nwhat", Image.new("RGB", (30, 30)))])
    with pytest.raises(DataError, match="needs a text"):
        model.encode([""])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "last"}, "not for text encoders"),
        ({"pooling": "max"}, "'max' is not known"),
    ],
)
def test_a_pooling_that_is_not_for_it(roberta: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(roberta, dtype="float32", **options)


def test_settings_that_change_nothing_are_noted(roberta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"max_pixels": 50176, "square": 128, "positions": "mrope", "numerics": "reference"}
    model = Embedder.from_pretrained(roberta, dtype="float32", **options)
    notes = capsys.readouterr().err
    assert all(f"note: {name} {value} changes nothing for a text encoder" in notes for name, value in options.items())
    plain = Embedder.from_pretrained(roberta, dtype="float32")
    assert (model.encode(["a red square"]) == plain.encode(["a red square"])).all()


def test_qwen_pools_its_last_token_only(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    assert Embedder.from_pretrained(tmp_path / "model", dtype="float32", pooling="last").settings.pooling == "last"
    with pytest.raises(InputError, match="pooling 'mean' is not for Qwen2-VL"):
        Embedder.from_pretrained(tmp_path / "model", dtype="float32", pooling="mean")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling lasttoken is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, r"pooling cls \+ mean is not supported"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "module Dense behind the encoder"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is not supported"),
    ],
)
def test_what_sentence_transformers_does_and_we_do_not(
    roberta: Path, tmp_path: Path, file: str, content: object, message: str
) -> None:
    folder = Path(shutil.copytree(roberta, tmp_path / "model"))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(folder, dtype="float32")


def test_a_checkpoint_that_lacks_weights(roberta: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(roberta, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, first: 'encoder\.layer\.1\.output\.dense\.weight'"):
        Embedder.from_pretrained(folder, dtype="float32")
