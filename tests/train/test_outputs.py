"""What a run leaves: scores on the way that change nothing, merged weights, a card and a report; rows that fail."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from forks import Job
from safetensors.torch import load_file

from b3.train.sampler import BatchPlanSampler, random_rows

BASE = ("adapter.dropout=0.2", "adapter.use_dora=true")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


def run(root: Path, name: str, *overrides: str, ranks: int = 1, code: int = 0) -> Job:
    job = Job(
        root / "logs" / name, str(root / "recipe.yaml"), f"output_dir={root / name}", *BASE, *overrides, ranks=ranks,
        draws=name == "scored",
    )  # fmt: skip
    assert job.wait() == [code] * ranks, job.text()
    return job


def lines(folder: Path, kind: str = "loss") -> list[dict]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if kind in line]


def evaluation(root: Path) -> str:
    data = root / "data"
    return (
        f"eval={{source: 'parquet:{data}', image_dir: {data}/images.parquet, subsets: [pictures, words],"
        " prefix_targets: false, every: 2}"
    )


@pytest.fixture(scope="module")
def scored(root: Path) -> Path:
    run(root, "scored", evaluation(root), "train.save_merged=true")
    return root / "scored"


def test_evaluation_on_the_way_changes_no_loss_and_no_weight(root: Path, scored: Path) -> None:
    run(root, "plain")
    assert tiny.without_times(lines(scored)) == tiny.without_times(lines(root / "plain"))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (scored, root / "plain"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [line["step"] for line in lines(scored, "evaluation")] == [2, 4, 6]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_evaluation(root: Path, scored: Path, ranks: int, tmp_path: Path) -> None:
    """With a learning rate that moves nothing, so that all ranks hold the weights of one process."""
    still = (evaluation(root), "train.lr=1e-12", "train.steps=2")
    run(root, f"still-{ranks}", *still, ranks=ranks)
    run(root, f"still-1-{ranks}", *still)
    many, one = (lines(root / name, "evaluation") for name in (f"still-{ranks}", f"still-1-{ranks}"))
    assert len(one) == 1
    assert many[0]["evaluation"] == one[0]["evaluation"]


def test_the_last_scores_are_those_of_the_finished_model(root: Path, scored: Path, tmp_path: Path) -> None:
    from b3.eval.run import EvalSpec, evaluate

    data = root / "data"
    spec = EvalSpec(
        str(root / "model"), f"parquet:{data}", str(scored), image_dir=str(data / "images.parquet"), split="test"
    )
    summary = evaluate(spec, ["pictures", "words"], tmp_path / "eval")
    last = json.loads((scored / "result.json").read_text())["evaluation"]
    assert last["step"] == 6
    assert {name: last["evaluation"][name] for name in summary["subsets"]} == summary["subsets"]
    assert last["evaluation"]["mean"] == pytest.approx(summary["mean"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_give_the_vectors_of_the_adapter(root: Path, scored: Path, tmp_path: Path, dtype: str) -> None:
    from b3 import Embedder
    from b3.config import load_config
    from b3.train.finish import save_merged

    folder = scored / "merged"
    if dtype == "bfloat16":
        config = load_config(root / "recipe.yaml")
        (tmp_path / "run").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "run" / name).write_bytes((scored / name).read_bytes())
        folder = save_merged(config, tmp_path / "run", torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"}
    assert not any("lora" in name for name in stored)
    items = ["a red disc", {"text": tiny.QUERY, "image": _image(tmp_path)}]
    merged = Embedder.from_pretrained(folder, dtype=dtype).encode(items)
    apart = Embedder.from_pretrained(root / "model", adapter=scored, dtype=dtype).encode(items)
    np.testing.assert_allclose(merged, apart, atol=1e-6)
    bare = Embedder.from_pretrained(root / "model", dtype=dtype).encode(items)
    assert np.abs(merged - bare).max() > 1e-3


def _image(folder: Path) -> str:
    file = folder / "image.png"
    file.write_bytes(tiny.image("red", "disc", 5))
    return str(file)


def test_stock_transformers_loads_the_merged_folder(scored: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

    _, loading = Qwen2VLForConditionalGeneration.from_pretrained(scored / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(scored / "merged").is_fast
    assert AutoImageProcessor.from_pretrained(scored / "merged") is not None


def test_the_card_and_the_report_tell_the_run(scored: Path) -> None:
    card, page = (scored / "README.md").read_text(), (scored / "report.html").read_text()
    fingerprint = json.loads((scored / "data.json").read_text())["pictures"]["fingerprint"]
    for text in (card, page):
        assert fingerprint[:16] in text and "pictures" in text and "save_merged: true" in text
    score = lines(scored, "evaluation")[-1]["evaluation"]["mean"]
    assert f"| mean | {100 * score:.1f} |" in card
    assert page.count("<svg") == 8
    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', "")), "the page must stand alone"


def test_a_line_of_the_log_says_what_it_promises(scored: Path) -> None:
    promised = (
        "loss grad_norm learning_rate in_batch_precision positive_similarity hardest_negative_similarity masked_columns"
        " pairs_per_second tokens_per_second waiting_for_data peak_memory_bytes tflops_per_rank mfu replaced_rows"
    )
    for line in lines(scored):
        assert set(promised.split()) <= line.keys()
        assert 0 <= line["waiting_for_data"] < 1 and line["peak_memory_bytes"] > 1e8
        assert -1 <= line["hardest_negative_similarity"] <= 1


@pytest.fixture(scope="module")
def broken(root: Path) -> tuple[Path, list[int]]:
    """Images in a folder, those of three rows broken: of the first, the second and the fourth batch."""
    images = root / "images"
    images.mkdir()
    rows = pq.read_table(root / "data" / "images.parquet").to_pylist()
    for row in rows:
        (images / row["path"]).write_bytes(row["bytes"])
    sampler = BatchPlanSampler(random_rows(96), 12)
    bad = [int(sampler.batch(step)[place, 1]) for step, place in ((0, 1), (1, 11), (3, 6))]
    for number in bad:
        (images / rows[number]["path"]).write_bytes(b"no image")
    return images, bad


def images_only(images: Path) -> tuple[str, ...]:
    return f"data.image_dir={images}", "data.datasets=[{subset: pictures}]"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named(root: Path, broken: tuple[Path, list[int]], workers: int) -> None:
    images, bad = broken
    job = run(root, f"named-{workers}", *images_only(images), f"train.workers={workers}", code=2)
    (line,) = [line for line in job.text().splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: pictures row {bad[0]}: image {bad[0]:04}.png in {images} does not decode")


def test_one_rank_that_cannot_read_stops_all_with_a_checkpoint(root: Path) -> None:
    rows = pq.read_table(root / "data" / "images.parquet").to_pylist()
    mended = root / "mended"
    mended.mkdir()
    for row in rows:
        (mended / row["path"]).write_bytes(row["bytes"])
    late = int(BatchPlanSampler(random_rows(96), 12).batch(3)[6, 1])  # of the second rank
    (mended / rows[late]["path"]).write_bytes(b"")
    job = run(root, "second", *images_only(mended), "train.save_every=100", ranks=2, code=2)
    assert "rank 1 cannot read its rows" in job.text(0)
    assert f"[rank 1] error: pictures row {late}:" in job.text(1)
    assert (root / "second" / "checkpoint-3" / "complete.json").exists()


def test_replaced_rows_are_counted_and_the_same_for_any_ranks_and_workers(
    root: Path, broken: tuple[Path, list[int]]
) -> None:
    images, bad = broken
    replace = (*images_only(images), "data.bad_images=replace", "data.max_bad_images=3", "adapter.dropout=0")
    run(root, "replaced", *replace, "train.workers=1")
    run(root, "replaced-2", *replace, ranks=2)
    folder = root / "replaced"
    entries = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["data_set"], entry["row"]) for entry in entries] == [
        (1, "pictures", bad[0]), (2, "pictures", bad[1]), (4, "pictures", bad[2]),
    ]  # fmt: skip
    for entry in entries:
        assert entry["replaced_by"] not in bad
        assert "does not decode" in entry["problem"]
    assert (root / "replaced-2" / "bad_rows.jsonl").read_text() == (folder / "bad_rows.jsonl").read_text()
    assert [line["replaced_rows"] for line in lines(folder)] == [1, 2, 2, 3, 3, 3]
    assert json.loads((folder / "result.json").read_text())["replaced_rows"] == 3
    for one, many in zip(lines(folder), lines(root / "replaced-2"), strict=True):
        assert one["loss"] == pytest.approx(many["loss"], rel=1e-4)
    assert "3 unreadable rows were replaced by others" in (folder / "README.md").read_text()


def test_more_bad_rows_than_allowed_end_the_run(root: Path, broken: tuple[Path, list[int]]) -> None:
    images, bad = broken
    replace = (*images_only(images), "data.bad_images=replace", "data.max_bad_images=1")
    job = run(root, "capped", *replace, code=2)
    assert f"2 rows could not be read, more than data.max_bad_images 1; the last: pictures row {bad[1]}" in job.text()
    job = run(root, "capped", *replace, code=2)  # the count goes on where it was
    assert "2 rows could not be read" in job.text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_step(root: Path, ranks: int) -> None:
    """A learning rate that throws the weights out of the numbers; what was saved before is finite."""
    run(root, f"nan-{ranks}", "train.lr=1e37", "train.max_grad_norm=0", "train.steps=8", ranks=ranks, code=2)
    folder = root / f"nan-{ranks}"
    (file,) = folder.glob("nonfinite-step-*.json")
    facts = json.loads(file.read_text())
    sampler = BatchPlanSampler([random_rows(96), random_rows(96)], 12, steps=8)
    batch = sampler.batch(facts["step"] - 1).tolist()
    names = ["pictures", "words"]
    assert [(row["data_set"], row["row"]) for row in facts["rows"]] == [(names[d], r) for d, r in batch]
    assert len(lines(folder)) == facts["step"] - 1
    assert all(np.isfinite(line["loss"]) for line in lines(folder))
    for checkpoint in folder.glob("checkpoint-*"):
        assert int(checkpoint.name.split("-")[1]) < facts["step"]
