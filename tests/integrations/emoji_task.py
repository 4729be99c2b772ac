"""A task of mteb over the embedded data: an image, and the caption that fits."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from b3.data.datasets import load_eval

ROWS = 24


class EmojiI2T(AbsTaskRetrieval):
    metadata = TaskMetadata(
        type="Any2AnyRetrieval",
        name="EmojiI2T",
        main_score="ndcg_at_10",
        dataset={"path": "none/embedded", "revision": "1"},
        description="Emoji to their captions.",
        category="i2t",
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        prompt={"query": "Find the caption.", "document": ""},
        reference=None, date=("2026-01-01", "2026-01-02"), domains=None, task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="",
    )  # fmt: skip

    def load_data(self, *arguments: Any, **options: Any) -> None:
        data = load_eval("embedded:emoji", "emoji_i2t")
        captions = [data.candidates(row)[0].text for row in range(ROWS)]
        corpus = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(captions))}
        images = [data.query(row).open_image() for row in range(ROWS)]
        split = RetrievalSplitData(
            queries=Dataset.from_dict({"id": [f"q{row}" for row in range(ROWS)], "image": images}),
            corpus=Dataset.from_dict({"id": list(corpus.values()), "text": list(corpus)}),
            relevant_docs={f"q{row}": {corpus[text]: 1} for row, text in enumerate(captions)},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True
