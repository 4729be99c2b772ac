"""sentence-transformers models as teachers: vectors as their own encode gives, and what cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from b3.config import load_config
from b3.data.items import Item
from b3.errors import DataError, RunError
from b3.mining.recipe import mine_recipe
from b3.mining.sentence_transformer import SentenceTransformerTeacher

WORDS = [*tiny.COLOURS, *tiny.SHAPES, "a", "what", "is", "?", "number", *"0123456789"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with WordPiece vocabulary and mean pooling, with a default prompt that must not be used."""
    st = pytest.importorskip("sentence_transformers", reason="pip install 'b3[st]' runs this test")
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    body = Transformer(str(folder / "hf"), max_seq_length=32)
    model = st.SentenceTransformer(modules=[body, Pooling(16)], prompts={"q": "red red "}, default_prompt_name="q")
    model.save(str(folder / "model"))
    return folder / "model"


def test_vectors_are_those_of_their_own_encode(bert: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(60)] + ["a red disc"] * 3 + [""]
    teacher = SentenceTransformerTeacher(str(bert))
    found = teacher.encode([Item(text) for text in texts])
    expected = np.stack([teacher.model.encode(text, prompt="", show_progress_bar=False) for text in texts])
    assert found.dtype == np.float32 and found.shape == (64, 16)
    assert np.allclose(found, expected, atol=1e-5)
    prompted = teacher.model.encode(texts[:5], show_progress_bar=False)
    assert not np.allclose(found[:5], prompted, atol=1e-3), "the default prompt is left out"


def test_each_distinct_text_is_encoded_once_and_sorted_by_tokens(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = SentenceTransformerTeacher(str(bert))
    seen: list[list[str]] = []
    encode = teacher.model.encode
    monkeypatch.setattr(
        teacher.model, "encode", lambda given, **options: seen.append(given) or encode(given, **options)
    )
    monkeypatch.setattr("b3.mining.sentence_transformer.BATCH_TOKENS", 40)
    teacher.encode([Item(" ".join(["disc"] * (1 + n % 12))) for n in range(48)])
    lengths = [len(text.split()) for batch in seen for text in batch]
    assert lengths == sorted(range(1, 13), reverse=True)
    assert len(seen) > 2 and all(sum(len(t.split()) + 2 for t in batch) <= 40 for batch in seen)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny.write_data(tmp_path / "data")
    return tmp_path


def test_all_three_kinds_of_teacher_give_plans(root: Path, bert: Path) -> None:
    tiny.write_model(root / "model")
    (root / "arrays").mkdir()
    arrays = np.random.default_rng(0).normal(size=(2, 96, 8)).astype(np.float32)
    for side, array in zip(("queries", "targets"), arrays, strict=True):
        np.save(root / "arrays" / f"words_{side}.npy", array)
    for teacher in (f"st:{bert}", str(root / "model"), str(root / "arrays")):
        mining = {"teacher": teacher, "dir": str(root / "plans" / teacher.replace("/", "_"))}
        recipe = tiny.write_recipe(root, data={"datasets": [{"subset": "words"}]}, mining=mining)
        plan = mine_recipe(load_config(recipe))["words"]
        assert plan.communities.shape == (24, 4) and plan.manifest["teacher"] == teacher


def test_a_text_only_model_refuses_images(root: Path, bert: Path) -> None:
    recipe = tiny.write_recipe(root, mining={"teacher": f"st:{bert}"})
    with pytest.raises(DataError, match=r"pictures queries: row 0 has an image, which the text-only teacher st:"):
        mine_recipe(load_config(recipe))


def test_a_folder_without_a_model_is_named(root: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="pip install 'b3[st]' runs this test")
    (root / "nothing").mkdir()
    recipe = tiny.write_recipe(root, mining={"teacher": f"st:{root / 'nothing'}"})
    with pytest.raises(RunError, match=r"nothing cannot be loaded \(") as caught:
        mine_recipe(load_config(recipe))
    assert "\n" not in str(caught.value)


def test_the_missing_library_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    recipe = tiny.write_recipe(root, mining={"teacher": "st:some/model"})
    with pytest.raises(RunError, match=r"needs sentence-transformers; install it: pip install 'b3\[st\]'"):
        mine_recipe(load_config(recipe))


def test_an_adapter_beside_it_is_refused(root: Path) -> None:
    recipe = tiny.write_recipe(root, mining={"teacher": "st:some/model", "teacher_adapter": "x"})
    with pytest.raises(RunError, match=r"teacher_adapter would not be loaded: mining\.teacher st:some/model"):
        mine_recipe(load_config(recipe))


class Multimodal:
    """What the wrapper sees of a model for images; its vectors tell what it was given."""

    def __init__(self, modalities: list[Any]) -> None:
        self.modalities = modalities

    def supports(self, modality: Any) -> bool:
        return modality in self.modalities

    def encode(self, given: list[Any], **options: Any) -> np.ndarray:
        kinds = {str: 0, Image.Image: 1, dict: 2}
        assert len({type(value) for value in given}) == 1, "a batch is of one kind"
        return np.array([[kinds[type(value)], len(value["text"]) if isinstance(value, dict) else 0] for value in given])


def test_images_go_to_a_model_that_reads_them() -> None:
    image = Image.new("RGB", (4, 4))
    items = [Item("<|image_1|>\nred disc", image), Item("a bar"), Item("<|image_1|>\n", Image.new("RGB", (5, 4)))]
    teacher = SentenceTransformerTeacher("clip", Multimodal(["text", "image", ("image", "text")]))
    assert teacher.encode(items).tolist() == [[2, 8], [0, 0], [1, 0]]
    apart = SentenceTransformerTeacher("clip", Multimodal(["text", "image"]))
    assert apart.encode(items[1:]).tolist() == [[0, 0], [1, 0]]
    with pytest.raises(DataError, match="items: row 0 has an image with a text"):
        apart.encode(items)
    with pytest.raises(DataError, match="there is nothing to encode"):
        apart.encode([])
