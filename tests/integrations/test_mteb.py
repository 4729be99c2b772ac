"""Our models in mteb: the vectors are ours, and so are the scores that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from integrations.close import TOLERANCE, distance

from b3 import Embedder
from b3.data.datasets import load_eval
from b3.errors import InputError

mteb = pytest.importorskip("mteb", reason="pip install 'b3[mteb]' runs this test")

from integrations.emoji_task import ROWS, EmojiI2T  # noqa: E402

from b3.integrations.mteb import Encoder, find_tasks, main, rows  # noqa: E402


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("mteb") / "qwen")


def expected_ndcg(queries: np.ndarray, documents: np.ndarray, right: list[int]) -> float:
    """Mean of 1 / log2(1 + rank) of the one right document among the first ten."""
    orders = np.argsort(-(queries @ documents.T), axis=1, kind="stable")
    ranks = [int(np.flatnonzero(order == row)[0]) for order, row in zip(orders, right, strict=True)]
    return float(np.mean([1 / np.log2(2 + rank) if rank < 10 else 0.0 for rank in ranks]))


def ours(model: Embedder) -> tuple[np.ndarray, np.ndarray, list[int]]:
    data = load_eval("embedded:emoji", "emoji_i2t")
    captions = [str(data.candidates(row)[0].text) for row in range(ROWS)]
    corpus = list(dict.fromkeys(captions))
    images = [{"text": "<|image_1|>\n", "image": data.query(row).open_image()} for row in range(ROWS)]
    return model.encode(images), model.encode(corpus), [corpus.index(text) for text in captions]


def test_scores_of_an_image_task_are_those_of_our_vectors(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(qwen), "--dtype", "float32", "--tasks", "integrations.emoji_task:EmojiI2T"]
    assert main([*arguments, "--out", str(out)]) == 0
    expected = expected_ndcg(*ours(Embedder.from_pretrained(qwen, dtype="float32")))
    assert f"EmojiI2T  ndcg_at_10  {100 * expected:.2f}" in capsys.readouterr().out
    (file,) = out.rglob("EmojiI2T.json")
    stored = json.loads(file.read_text())["scores"]["test"][0]["main_score"]
    assert 0 < expected < 1 and stored == pytest.approx(expected, abs=1e-4)


class Seen(Encoder):
    """Notes what it gave."""

    def encode(self, inputs: Any, **options: Any) -> np.ndarray:
        vectors = super().encode(inputs, **options)
        self.given = {**getattr(self, "given", {}), str(options["prompt_type"]): vectors}
        return vectors


def test_vectors_are_ours(qwen: Path) -> None:
    encoder = Seen(str(qwen), dtype="float32")
    mteb.evaluate(encoder, EmojiI2T(), cache=None, co2_tracker=False, show_progress_bar=False)
    queries, documents, _ = ours(Embedder.from_pretrained(qwen, dtype="float32"))
    for name, vectors in (("query", queries), ("document", documents)):
        (found,) = (given for key, given in encoder.given.items() if name in key)
        assert distance(found, vectors) < TOLERANCE


@pytest.mark.parametrize("kind", ["MockRetrievalTask", "MockSTSTask", "MockClassificationTask"])
def test_text_tasks_whose_data_mteb_carries(tmp_path: Path, kind: str) -> None:
    """A text encoder gets the scores that mteb gives it through sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    from mteb.mocks import mock_tasks

    model = Embedder.from_pretrained(tiny.write_text_model(tmp_path / "base"), dtype="float32")
    model.save(tmp_path / "saved")
    scores = []
    for encoder in (
        Encoder(str(tmp_path / "saved"), dtype="float32"),
        library.SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
    ):
        task = getattr(mock_tasks, kind)()
        result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
        scores.append(result.task_results[0].get_score())
    assert np.isfinite(scores[0]) and scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_prompts_go_to_their_side_and_instructions_where_the_rule_has_a_place(qwen: Path) -> None:
    from mteb.types import PromptType

    metadata = EmojiI2T.metadata
    plain = Encoder(str(qwen), dtype="float32")
    assert plain.prompt(metadata, PromptType.query) == ""
    given = Encoder(str(qwen), dtype="float32", query_prompt="q: ", document_prompt="d: ")
    assert [given.prompt(metadata, kind) for kind in PromptType] == ["q: ", "d: "]
    ruled = Encoder(str(qwen), dtype="float32", prompt="vlm2vec")
    assert [ruled.prompt(metadata, kind) for kind in PromptType] == ["Find the caption.", ""]


def test_metadata_names_the_weights(qwen: Path, tmp_path: Path) -> None:
    meta = Encoder(str(qwen), dtype="float32", dim=16).mteb_model_meta
    whole = Encoder(str(qwen), dtype="float32").mteb_model_meta
    assert meta.name == "local/qwen" and meta.embed_dim == 16 and whole.embed_dim == 32
    assert meta.modalities == ["text", "image"] and meta.experiment_kwargs["dim"] == 16
    assert len(meta.revision) == 40 and meta.revision == whole.revision
    model = Embedder.from_pretrained(qwen, dtype="float32")
    next(model.backbone.parameters()).data.mul_(1.01)
    model.save(tmp_path / "other")
    assert Encoder(str(tmp_path / "other"), dtype="float32").mteb_model_meta.revision != whole.revision


def test_what_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="there is no task 'NoSuchTask'"):
        find_tasks(["NoSuchTask"])
    with pytest.raises(InputError, match="give a name of mteb, or module:Class"):
        find_tasks(["integrations.emoji_task:None"])
    with pytest.raises(InputError, match="a row has video; texts and images are read here"):
        list(rows([{"video": [0]}]))
