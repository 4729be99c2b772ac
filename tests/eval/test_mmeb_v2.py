"""MMEB-V2 against what the reference programs recorded: prompts, media, ids, pixels, vectors, rankings, score files."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import GOLDEN, checkpoint
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

import eval_mmeb
from b3 import Embedder
from b3.data.items import Item, Still
from b3.eval.benchmarks.mmeb_v2.benchmark import MMEB_V2, load_task
from b3.eval.benchmarks.mmeb_v2.harness import harness_settings
from b3.eval.ranked import RankedSet
from b3.eval.ranking import Encoded, encode_set, rankings
from b3.eval.ranking_metrics import METRICS
from b3.model.encode import Encoder

pytestmark = pytest.mark.core

SIX = ["ImageNet-1K", "WebQA", "RefCOCO-Matching", "Breakfast", "MSR-VTT", "ViDoSeek-doc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def whole_table(source: Path, folder: Path, name: str) -> Path:
    """A checkpoint whose stored embedding rows are put back into the whole table, with the shared tokenizer."""
    import torch

    folder.mkdir(exist_ok=True)
    for file in [*source.iterdir(), *(GOLDEN / "tokenizer").iterdir()]:
        shutil.copy(file, folder / file.name)
    weights = load_tensors(folder / "model.safetensors")
    rows, values = weights.pop("embedding_rows"), weights.pop("embedding_values")
    table = torch.zeros(151936, values.shape[1], dtype=values.dtype)
    table[rows.long()] = values
    save_file(weights | {name: table}, folder / "model.safetensors")
    return folder


def load(golden: Path, task: str, **options: Any) -> RankedSet:
    return load_task(str(golden / "hub"), task, image_dir=str(golden / "data"), **options)


def names_of(golden: Path) -> list[str]:
    return list(json.loads((golden / "tasks.json").read_text()))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def media(golden: Path, item: Item) -> list[str]:
    """File names below the data folder; pages that come from a table have none."""
    result = []
    for medium in item.media:
        for one in (medium,) if isinstance(medium, Still) else medium.frames:
            source: Any = one.source
            path = source if isinstance(source, str) else f"{source.store.location}/{source.path}"
            result.append(str(Path(path).relative_to(golden / "data")) if "/data/" in path else path)
    return result


def written(item: Item) -> str:
    return (item.text or "").replace("<|image_1|>", "<|image_pad|>").replace("<|video_1|>", "<|video_pad|>")


def test_prompts_frames_names_and_infos_of_34_tasks(golden_v2: Path) -> None:
    for task in names_of(golden_v2):
        dataset = load(golden_v2, task)
        items = json.loads((golden_v2 / "results/base_fp32/items" / f"{task}.json").read_text())
        infos = lines(golden_v2 / "results/base_fp32" / f"{task}_info.jsonl")
        assert [query.info for query in dataset.queries] == infos
        assert [json.dumps(q.info) for q in dataset.queries] == [json.dumps(info) for info in infos]
        assert list(dataset.candidates) == [one["name"] for one in items["candidate"]]
        ours = [*(query.item for query in dataset.queries), *dataset.candidates.values()]
        for item, theirs in zip(ours, items["query"] + items["candidate"], strict=True):
            assert written(item) == theirs["prompt"], task
            if MMEB_V2.task(task).modality != "visdoc":
                assert media(golden_v2, item) == theirs.get("media", []), task


@pytest.mark.parametrize("harness", ["qwen3_vl_embedding"])
def test_item_dictionaries_of_qwens_program(golden_v2: Path, harness: str) -> None:
    files = sorted((golden_v2 / "qwen_harness").glob("*.json"))
    assert len(files) == 34  # 33 tasks and a summary
    for file in files:
        if file.stem == "summary":
            continue
        dataset = load(golden_v2, file.stem, harness=harness, prompt=harness)
        items = json.loads(file.read_text())
        assert list(dataset.candidates) == [one["name"] for one in items["candidate"]]
        assert [query.info for query in dataset.queries] == [one["infos"] for one in items["query"]]
        ours = [*(query.item for query in dataset.queries), *dataset.candidates.values()]
        is_page = MMEB_V2.task(file.stem).modality == "visdoc"
        for item, theirs in zip(ours, items["query"] + items["candidate"], strict=True):
            expected = dict(theirs["item"])
            mine: dict[str, Any] = {} if item.text is None else {"text": item.text}
            mine |= {} if item.instruction is None else {"instruction": item.instruction}
            for medium in item.media:
                names = media(golden_v2, item)
                mine |= {"image": names[0]} if isinstance(medium, Still) else {"video": names}
            if is_page and "image" in expected:
                expected["image"] = mine["image"]
            assert mine == expected, file.stem


def test_texts_and_middle_frames_of_gme(golden_v2: Path) -> None:
    for task in ["ImageNet-1K", "WebQA", "NIGHTS", "Breakfast", "MSR-VTT", "ViDoSeek-doc"]:
        dataset = load(golden_v2, task, prompt="gme")
        items = json.loads((golden_v2 / "gme" / f"{task}.json").read_text())
        ours = [*(query.item for query in dataset.queries), *dataset.candidates.values()]
        for item, theirs in zip(ours, items["query"] + items["candidate"], strict=True):
            assert item.text == theirs["text"]
            if task != "ViDoSeek-doc":
                assert media(golden_v2, item) == ([theirs["media"]] if "media" in theirs else [])


def encoded_by(model: Embedder, dataset: RankedSet) -> Encoded:
    return encode_set(dataset, Encoder(model))


def near(encoded: Encoded, recorded: dict[str, np.ndarray], task: str, names: list | None = None) -> float:
    """The largest difference of a vector."""
    query = np.abs(encoded.vectors[encoded.queries] - recorded[f"{task}/query"]).max()
    candidate = np.abs(encoded.vectors[encoded.candidates] - recorded[f"{task}/candidate"]).max()
    return float(max(query, candidate))


def check_inputs(model: Embedder, dataset: RankedSet, results: Path, task: str) -> None:
    """Token ids, grids and pixels of every item."""
    items = json.loads((results / "items" / f"{task}.json").read_text())
    ids = load_file(results / "input_ids.safetensors")
    for side, ours in (
        ("query", [q.item for q in dataset.queries]),
        ("candidate", list(dataset.candidates.values())),
    ):
        ends = ids[f"{task}/{side}_row_ptr"]
        for row, (item, theirs) in enumerate(zip(ours, items[side], strict=True)):
            processed = model.processor(item)
            assert processed.input_ids.tolist() == ids[f"{task}/{side}"][ends[row] : ends[row + 1]].tolist()
            assert [list(visual.grid) for visual in processed.visuals] == (theirs.get("grid_thw") or [])
            for visual in processed.visuals:
                import torch

                pixels = model.pixels.numbers(torch.from_numpy(visual.patches)).numpy()
                assert hashlib.sha256(pixels.tobytes()).hexdigest() == theirs["pixel_sha256"], (task, side, row)


@pytest.fixture(scope="module")
def model(folder: Path) -> Embedder:
    _, _, settings = harness_settings("vlm2vec", str(folder), {}, folder)
    return Embedder.from_pretrained(folder, dtype="float32", **fields(settings))


def fields(settings: Any) -> dict[str, Any]:
    return {
        name: getattr(settings, name) for name in settings.__slots__ if (name, getattr(settings, name)) != ("dim", None)
    }


def test_vectors_rankings_and_metrics_of_34_tasks(golden_v2: Path, model: Embedder) -> None:
    results = golden_v2 / "results" / "base_fp32"
    recorded = load_file(results / "embeddings.safetensors")
    tied = json.loads((results / "scores_duplicates_tied.json").read_text())
    for task in names_of(golden_v2):
        dataset = load(golden_v2, task)
        check_inputs(model, dataset, results, task)
        encoded = encoded_by(model, dataset)
        assert near(encoded, recorded, task) < 1e-5, task
        check_rankings(dataset, encoded, recorded, task)
        metrics = metrics_of(replace(dataset, pairing="reference"), encoded)
        for name, value in tied[task]["reference_pairing"].items():
            is_graded_string = task == "VisRAG_SlideVQA" and name.startswith("ndcg")
            assert is_graded_string or metrics[name] == pytest.approx(value, abs=1e-9), (task, name)
        for name, value in tied[task].get("right_pairing_ndcg", {}).items():
            assert metrics_of(dataset, encoded)[name] == pytest.approx(value, abs=1e-9), (task, name)


def metrics_of(dataset: RankedSet, encoded: Encoded) -> dict[str, float]:
    from b3.eval.ranking import Ranking, collect

    kept = Ranking.empty(dataset)
    for _ in collect(dataset, rankings(dataset, encoded), kept):
        pass
    return {name: float(kept.values[name].mean()) for name in METRICS}


def check_rankings(dataset: RankedSet, encoded: Encoded, recorded: dict[str, np.ndarray], task: str) -> None:
    """Every ranking is the recorded one in which copies share a score, but for scores that differ by less than 3e-6."""
    ends, names = recorded[f"{task}/scores_row_ptr"], list(dataset.candidates)
    for row, one in enumerate(rankings(dataset, encoded)):
        order = recorded[f"{task}/ranking_duplicates_tied"][ends[row] : ends[row + 1]]
        scores = recorded[f"{task}/scores"][ends[row] : ends[row + 1]]
        own = dataset.queries[row].info["cand_names"] if dataset.is_local else names
        theirs = [own[i] for i in order]
        for place, (a, b) in enumerate(zip(one.names, theirs, strict=True)):
            if a != b:
                gap = abs(scores[order[place]] - scores[own.index(a)])
                assert gap < 3e-6, (task, row, place)
        assert np.abs(one.scores - np.sort(scores)[::-1]).max() < 1e-5


@pytest.mark.parametrize(("run", "side"), [("base_fp32_low128", 128), ("base_fp32_high1344", 1344)])
def test_images_at_a_fixed_resolution(golden_v2: Path, folder: Path, run: str, side: int) -> None:
    results = golden_v2 / "results" / run
    recorded = load_file(results / "embeddings.safetensors")
    _, _, settings = harness_settings("vlm2vec", str(folder), {"square": side}, folder)
    model = Embedder.from_pretrained(folder, dtype="float32", **fields(settings))
    for file in sorted((results / "items").glob("*.json")):
        dataset = load(golden_v2, file.stem)
        check_inputs(model, dataset, results, file.stem)
        assert near(encoded_by(model, dataset), recorded, file.stem) < 1e-5, file.stem


def test_gme_inside_vlm2vecs_program(golden_v2: Path, folder: Path) -> None:
    harness, prompt, settings = harness_settings(None, str(folder), {"prompt": "gme"}, folder)
    assert (harness, prompt, settings.min_pixels) == ("vlm2vec", "gme", 3136)
    model = Embedder.from_pretrained(folder, dtype="float32", **fields(settings))
    recorded = load_file(golden_v2 / "gme" / "expected.safetensors")
    for task in ["ImageNet-1K", "WebQA", "NIGHTS", "Breakfast", "MSR-VTT", "ViDoSeek-doc"]:
        dataset = load(golden_v2, task, prompt=prompt)
        encoded = encoded_by(model, dataset)
        assert near(encoded, recorded, task) < 1e-5, task
        for one, theirs in zip(
            rankings(dataset, encoded), lines(golden_v2 / "gme" / f"{task}_pred.jsonl"), strict=True
        ):
            assert one.names == theirs["prediction"] or task == "ViDoSeek-doc"


def test_qwen2_5_vl_inside_vlm2vecs_program(golden_v2: Path, tmp_path: Path) -> None:
    source = golden_v2 / "qwen2_5_vl"
    folder = whole_table(source / "tiny-qwen2_5vl", tmp_path / "model", "model.embed_tokens.weight")
    _, _, settings = harness_settings("vlm2vec", str(folder), {}, folder)
    model = Embedder.from_pretrained(folder, dtype="float32", **fields(settings))
    results = source / "results" / "base_fp32"
    recorded = load_file(results / "embeddings.safetensors")
    for task in SIX:
        dataset = load(golden_v2, task)
        check_inputs(model, dataset, results, task)
        assert near(encoded_by(model, dataset), recorded, task) < 1e-5, task


@pytest.mark.parametrize(
    ("name", "flag"), [("Qwen3-VL-Embedding-2B", []), ("model", ["--harness", "qwen3_vl_embedding"])]
)
def test_qwens_program_end_to_end(golden_v2: Path, tmp_path: Path, name: str, flag: list[str]) -> None:
    """Harness and prompt follow from the published model's name, or from the flag."""
    source = GOLDEN / "qwen3_vl_embedding" / "tiny-qwen3vl"
    folder = whole_table(source, tmp_path / name, "model.language_model.embed_tokens.weight")
    results = golden_v2 / "qwen_harness" / "results"
    tasks = sorted(file.name.removesuffix("_score.json") for file in results.glob("*_score.json"))
    command = flags(golden_v2, folder, tmp_path / "out", "--ndcg", "reference", *flag, subsets=tasks)
    assert eval_mmeb.main(command) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["harness"] == "qwen3_vl_embedding"
    harness, prompt, settings = harness_settings(flag[-1] if flag else None, str(folder), {}, folder)
    model = Embedder.from_pretrained(folder, dtype="float32", **fields(settings))
    recorded = load_file(results / "embeddings.safetensors")
    for task in tasks:
        dataset = load(golden_v2, task, harness=harness, prompt=prompt)
        assert near(encoded_by(model, dataset), recorded, task) < 1e-5, task
        theirs = json.loads((results / f"{task}_score.json").read_text())
        assert summary["metrics"][task] == pytest.approx(theirs, abs=1e-9), task


def flags(golden: Path, model: Path, out: Path, *more: str, subsets: list[str]) -> list[str]:
    return [
        "--benchmark", "mmeb_v2", "--model_name", str(model), "--normalize", "True", "--encode_output_path", str(out),
        "--dataset_name", str(golden / "hub"), "--data_basedir", str(golden / "data"), "--subset_name", *subsets, *more,
    ]  # fmt: skip
