r"""MMEB-V2 in miniature, without a download: emoji as images, films of moving emoji, pages of a dictionary, charts.

    python eval_mmeb.py --benchmark emoji_v2 --model_name MODEL --normalize True --subset_name all \
        --encode_output_path OUT

Image tasks are the first rows of the embedded emoji data (texts and candidates as there, ranked by name); films and
pages are `b3/data/emoji_v2`. Harness, metrics and files are those of MMEB-V2. A model with random weights is near
chance. The numbers compare one's own models with each other.
"""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from b3.data.datasets import load_eval
from b3.data.images import ImageRef, ParquetImages
from b3.data.items import Item, Medium, Still, Video
from b3.data.prompts import PLACEHOLDER
from b3.data.tables import embedded_root
from b3.errors import InputError
from b3.eval.benchmark import Benchmark, Task
from b3.eval.benchmarks.mmeb_v2.harness import Harness
from b3.eval.ranked import Name, RankedQuery, RankedSet

IMAGE_ROWS = 50
_TASKS = {
    ("image", "I-CLS"): "emoji_cls",
    ("image", "I-QA"): "emoji_vqa",
    ("image", "I-RET"): "emoji_t2i emoji_i2t emoji_i2i",
    ("image", "I-VG"): "emoji_vg",
    ("video", "V-CLS"): "film_cls",
    ("video", "V-QA"): "film_qa",
    ("video", "V-RET"): "film_ret",
    ("video", "V-MRET"): "film_moment",
    ("visdoc", "Pages"): "page_word page_meaning",
    ("visdoc", "Charts"): "chart",
}
METRIC = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg_linear@5"}


def load_task(
    source: str,
    name: str,
    split: str = "test",
    *,
    image_dir: str | None = None,
    prefix_targets: bool = False,
    harness: str = "vlm2vec",
    prompt: str = "plain",
    captions: str = "path",
    ndcg: str = "right",
    lenient: bool = False,
) -> RankedSet:
    """The queries and candidates of one task; arguments as for MMEB-V2, of which only those of `Harness.of`,
    `prefix_targets` and `ndcg` change anything here. Raises `InputError` for a name that is not known.
    """
    if name not in EMOJI_V2.names:
        raise InputError(f"emoji_v2 has no task '{name}'; choose {', '.join(EMOJI_V2.names)}, a group or a modality")
    writer = Harness.of(harness, prompt)
    return _images(name, writer, prefix_targets) if name.startswith("emoji_") else _films_and_pages(name, writer, ndcg)


def _images(name: str, harness: Harness, prefix_targets: bool) -> RankedSet:
    dataset = load_eval("embedded:emoji", name, prefix_targets=prefix_targets, max_rows=IMAGE_ROWS)
    queries, candidates = [], dict[Name, Item]()
    for row in range(len(dataset)):
        raw = dataset.raw_candidates(row)
        names: list[Name] = [path or text for text, path in raw]
        for own, item in zip(names, dataset.candidates(row), strict=True):
            candidates.setdefault(own, _rewritten(item, harness, is_query=False))
        query = _rewritten(dataset.query(row), harness, is_query=True)
        queries.append(RankedQuery(query, {"cand_names": names, "label_name": names[0]}))
    return RankedSet(name, queries, candidates, is_local=True)


def _rewritten(item: Item, harness: Harness, is_query: bool) -> Item:
    """An item of version 1, whose text holds its instruction, for models that take both apart."""
    if harness.has_tokens or not (item.media or is_query):
        return item
    text = (item.text or "").replace(PLACEHOLDER, "").strip()
    medium = item.media[0] if item.media else None
    return harness.query(text, None, medium) if is_query or medium is None else harness.target(text, medium)


def _films_and_pages(name: str, harness: Harness, ndcg: str) -> RankedSet:
    root = embedded_root("emoji_v2")
    store = ParquetImages(root / "images.parquet")
    is_video = name.startswith("film_")

    def medium(paths: list[str], limit: int) -> Medium | None:
        stills = tuple(Still(ImageRef(store, path)) for path in paths)
        if not stills:
            return None
        return Video(Video(stills).sample(limit, 1.0)) if is_video else stills[0]

    candidates: dict[Name, Item] = {}
    for row in pq.read_table(root / "candidates" / f"{name}.parquet").to_pylist():
        shown = medium(row["media"], harness.clip_frames)
        candidates[row["name"]] = Item(row["text"]) if shown is None else harness.target(row["instruction"], shown)
    queries = []
    for row in pq.read_table(root / "queries" / f"{name}.parquet").to_pylist():
        item = harness.query(row["instruction"], row["text"], medium(row["media"], harness.num_frames))
        labels = row["labels"]
        info: dict[str, Any] = {"cand_names": row["candidates"] or labels, "label_name": labels}
        queries.append(RankedQuery(item, info | ({"rel_scores": row["grades"]} if row["grades"] else {})))
    is_local = name in ("film_qa", "film_moment")
    return RankedSet(name, queries, candidates, is_local, ndcg)


EMOJI_V2 = Benchmark(
    "emoji_v2",
    tuple(
        Task(name, group, metric=METRIC[modality], modality=modality, takes_square=group != "V-QA")
        for (modality, group), names in _TASKS.items()
        for name in names.split()
    ),
    "embedded:emoji_v2",
    load=load_task,
    subsets=lambda source, split: [],
    has_harnesses=True,
)
