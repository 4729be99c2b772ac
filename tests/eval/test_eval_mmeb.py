"""The published command line against the recorded predictions of the reference, and what it says when it cannot run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from golden_data import GOLDEN, checkpoint
from safetensors.numpy import load_file

import eval_mmeb
from b3.data.datasets import load_eval
from b3.errors import RunError
from b3.eval.run import CACHE_FACTS, EvalSpec, evaluate, evaluate_subset
from b3.model.cache import EmbeddingCache
from b3.model.encode import Encoder
from b3.model.settings import Settings

pytestmark = pytest.mark.core

SUBSETS = ["ImageNet-1K", "MSCOCO_i2t", "MSCOCO_t2i", "OK-VQA", "RefCOCO-Matching", "WebQA"]
DATA = GOLDEN / "mmeb-eval"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def flags(model: Path, out: Path, *more: str, subsets: list[str] | None = None) -> list[str]:
    """The command of the release's README, on local data."""
    return [
        "--model_name", str(model), "--encode_output_path", str(out), "--pooling", "eos", "--normalize", "True",
        "--dataset_name", str(DATA), "--subset_name", *(subsets or ["all"]), "--dataset_split", "test",
        "--per_device_eval_batch_size", "4", "--image_dir", str(DATA / "eval_images"), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("run", ["base_fp32", "base_fp32_prefix", "dora_fp32", "dora_fp32_prefix"])
def test_predictions_and_scores_equal_the_reference(folder: Path, tmp_path: Path, run: str) -> None:
    more = ["--tgt_prefix_mod"] if run.endswith("prefix") else []
    adapter = GOLDEN / "adapter-dora" if run.startswith("dora") else None
    if adapter:
        more += ["--lora", "--lora_r", "8", "--checkpoint_path", str(adapter)]
    assert eval_mmeb.main(flags(folder, tmp_path / "out", *more)) == 0
    expected = GOLDEN / "mmeb-eval-results" / run
    recorded = load_file(expected / "scores.safetensors")
    for subset in SUBSETS:
        ours = (tmp_path / "out" / f"{subset}_pred.txt").read_text().splitlines()
        theirs = (expected / f"{subset}_pred.txt").read_text().splitlines()
        tied = recorded[f"{subset}/top_tie"].astype(bool)
        assert len(ours) == len(theirs)
        assert [a for a, t in zip(ours, tied, strict=True) if not t] == [
            b for b, t in zip(theirs, tied, strict=True) if not t
        ]
        score = json.loads((tmp_path / "out" / f"{subset}_score.json").read_text())
        reference = json.loads((expected / f"{subset}_score.json").read_text())
        assert score.keys() == reference.keys()
        assert 0 <= score["num_correct"] - reference["num_correct"] <= tied.sum()  # a tie counts as right
        assert score["num_data"] == reference["num_data"]


def test_every_score_equals_the_reference(folder: Path) -> None:
    spec = EvalSpec(str(folder), str(DATA), adapter=str(GOLDEN / "adapter-dora"), prefix_targets=True)
    encoder = Encoder(spec.load())
    recorded = load_file(GOLDEN / "mmeb-eval-results" / "dora_fp32_prefix" / "scores.safetensors")
    for subset in SUBSETS:
        dataset = load_eval(str(DATA), subset, image_dir=str(DATA / "eval_images"), prefix_targets=True)
        scores = np.concatenate(evaluate_subset(dataset, encoder).scores)
        assert np.abs(scores - recorded[f"{subset}/scores"]).max() < 1e-5


@pytest.mark.parametrize("field", Settings.__slots__)
def test_vectors_under_one_setting_are_never_taken_for_another(folder: Path, tmp_path: Path, field: str) -> None:
    values = {"positions": "mrope", "numerics": "reference", "pooling": "cls", "prompt": "gme"}
    usual = EvalSpec(str(folder), str(DATA))
    other = replace(usual, settings=replace(Settings(), **{field: values.get(field, 6272)}))
    caches = [EmbeddingCache(tmp_path, {k: spec.facts()[k] for k in CACHE_FACTS}).folder for spec in (usual, other)]
    assert caches[0] != caches[1]


def test_pooling_is_part_of_an_evaluation(tmp_path: Path) -> None:
    model = tiny.write_text_model(tmp_path / "model")
    data, summaries = tiny.write_data(tmp_path / "data", rows=12), {}
    for pooling in ("mean", "cls"):
        spec = EvalSpec(str(model), f"parquet:{data}", settings=Settings(pooling=pooling))
        summaries[pooling] = evaluate(spec, ["words"], tmp_path / pooling)
        again = replace(spec, settings=Settings(pooling="cls" if pooling == "mean" else "mean"))
        with pytest.raises(RunError, match=f"settings.pooling was '{pooling}', now"):
            evaluate(again, ["words"], tmp_path / pooling)
    for name in ("manifest.json", "words_score.json"):
        (tmp_path / "mean" / name).unlink()
    third = evaluate(spec, ["words"], tmp_path / "mean")  # beside the vectors of the other pooling
    assert third["items"] == summaries["cls"]["items"] > 0
    predictions = [(tmp_path / p / "words_pred.txt").read_text() for p in ("mean", "cls")]
    assert predictions[0] == predictions[1]


def test_hub_loader_reads_the_same_rows() -> None:
    hub = load_eval(f"hub:{DATA}", "WebQA", image_dir=str(DATA / "eval_images"))
    local = load_eval(str(DATA), "WebQA", image_dir=str(DATA / "eval_images"))
    assert len(hub) == len(local) > 0
    assert [hub.query(i).key for i in range(len(hub))] == [local.query(i).key for i in range(len(local))]
    assert [hub.raw_candidates(i) for i in range(len(hub))] == [local.raw_candidates(i) for i in range(len(local))]


def test_summary_has_families_and_domains(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_mmeb.main(flags(folder, tmp_path)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    values = list(summary["subsets"].values())
    assert summary["mean"] == pytest.approx(sum(values) / len(values))
    assert summary["OOD"] == summary["subsets"]["RefCOCO-Matching"]
    assert "Visual grounding" in capsys.readouterr().out
    before = (tmp_path / "WebQA_score.json").stat().st_mtime_ns
    assert eval_mmeb.main(flags(folder, tmp_path)) == 0  # nothing is scored twice
    assert (tmp_path / "WebQA_score.json").stat().st_mtime_ns == before


def test_flags_without_effect_are_accepted_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--model_backbone",
        "qwen2_vl",
        "--adam_beta1",
        "0.5",
        "--grad_cache",
        "True",
        "--output_dir",
        "x",
    ]
    assert eval_mmeb.main(flags(folder, tmp_path, *more, subsets=["WebQA"])) == 0
    out = capsys.readouterr().out
    assert all(f"note: --{name} has no effect" in out for name in ("model_backbone", "adam_beta1", "grad_cache"))


@pytest.mark.parametrize(
    ("more", "subsets", "message"),
    [
        ([], ["Nothing"], "subsets there: ImageNet-1K, MSCOCO_i2t"),
        (["--lora"], ["WebQA"], "holds no adapter_config.json"),
        (["--checkpoint_path", str(DATA)], ["WebQA"], "holds no adapter_config.json; name an adapter"),
        (["--lora_r", "4"], ["WebQA"], "need --lora"),
        (
            ["--lora", "--lora_r", "4", "--checkpoint_path", str(GOLDEN / "adapter-lora")],
            ["WebQA"],
            "contradicts the adapter",
        ),
        (["--no_such_flag"], ["WebQA"], "unknown flag --no_such_flag"),
        (["--pooling", "mean"], ["WebQA"], "--pooling mean is not supported"),
        (["--image_dir", "/nowhere"], ["WebQA"], "image_dir /nowhere does not exist"),
        (["--model_name", "/nowhere"], ["WebQA"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], subsets: list[str], message: str
) -> None:
    assert eval_mmeb.main(flags(folder, tmp_path, *more, subsets=subsets)) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_an_output_folder_of_another_run_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_mmeb.main(flags(folder, tmp_path, subsets=["WebQA"])) == 0
    assert eval_mmeb.main(flags(folder, tmp_path, "--tgt_prefix_mod", subsets=["WebQA"])) == 2
    assert "holds another evaluation (prefix_targets was False, now True)" in capsys.readouterr().err


def test_a_broken_image_keeps_what_was_scored(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    rows = pq.read_table(next((data / "WebQA").glob("*.parquet"))).to_pylist()
    paths = [p for row in rows for p in row["tgt_img_path"] if p]
    (data / "eval_images" / paths[0]).write_bytes(b"\x89PNG not really")
    command = flags(folder, tmp_path / "out", subsets=["OK-VQA", "WebQA"])
    command[command.index("--dataset_name") + 1] = str(data)
    command[command.index("--image_dir") + 1] = str(data / "eval_images")
    assert eval_mmeb.main(command) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    row = next(number for number, row in enumerate(rows) if paths[0] in (row["qry_img_path"], *row["tgt_img_path"]))
    assert message.startswith(f"error: WebQA row {row}: image {paths[0]} in {data / 'eval_images'} does not decode")
    assert message.endswith("or give --on_error skip")
    assert (tmp_path / "out" / "OK-VQA_score.json").exists()
    assert not (tmp_path / "out" / "WebQA_score.json").exists()


def test_rows_with_unequal_lists_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Own").mkdir()
    row = {
        "qry_text": ["a", "b"],
        "qry_img_path": ["", ""],
        "tgt_text": [["x"], ["x", "y"]],
        "tgt_img_path": [[""], [""]],
    }
    pq.write_table(pa.table(row), tmp_path / "Own" / "test.parquet")
    command = flags(folder, tmp_path / "out", subsets=["Own"])
    command[command.index("--dataset_name") + 1] = str(tmp_path)
    assert eval_mmeb.main(command) == 2
    assert "row 1: tgt_text and tgt_img_path must be lists of equal length" in capsys.readouterr().err


def test_skipping_keeps_the_denominator_and_says_so(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    rows = pq.read_table(next((data / "WebQA").glob("*.parquet"))).to_pylist()
    broken = rows[0]["tgt_img_path"][0]
    (data / "eval_images" / broken).write_bytes(b"")
    command = flags(folder, tmp_path / "out", "--on_error", "skip", subsets=["WebQA"])
    command[command.index("--dataset_name") + 1] = str(data)
    command[command.index("--image_dir") + 1] = str(data / "eval_images")
    assert eval_mmeb.main(command) == 0
    score = json.loads((tmp_path / "out" / "WebQA_score.json").read_text())
    assert score["num_data"] == score["num_pred"] == len(rows)
    assert score["num_incomplete"] == sum(broken in row["tgt_img_path"] for row in rows)
    assert any(broken in reason for reason in score["skipped"].values())
    positives = [row["tgt_img_path"][0] for row in rows]
    predictions = (tmp_path / "out" / "WebQA_pred.txt").read_text().splitlines()
    assert not any(broken in line for line, path in zip(predictions, positives, strict=True) if path == broken)


def test_the_published_command_on_an_adapter_repository(folder: Path, tmp_path: Path) -> None:
    """The command of the release's README, word for word but for the names and the places of model and data."""
    repository = tmp_path / "B3_Qwen2_7B"
    shutil.copytree(GOLDEN / "adapter-dora", repository)
    config = json.loads((repository / "adapter_config.json").read_text())
    (repository / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    command = (
        f"--model_name {repository} --encode_output_path {tmp_path / 'out'} --pooling eos --normalize True --lora"
        f" --lora_r 8 --bf16 --dataset_name {DATA} --subset_name MSCOCO_i2t --dataset_split test"
        f" --per_device_eval_batch_size 4 --image_dir {DATA / 'eval_images'} --tgt_prefix_mod"
    )
    assert eval_mmeb.main(command.split()) == 0
    reference = GOLDEN / "mmeb-eval-results" / "dora_bf16_prefix" / "MSCOCO_i2t_score.json"
    ours = json.loads((tmp_path / "out" / "MSCOCO_i2t_score.json").read_text())
    assert abs(ours["num_correct"] - json.loads(reference.read_text())["num_correct"]) <= 2  # bfloat16


def test_a_family_explained_and_squared(folder: Path, tmp_path: Path) -> None:
    more = ["--explain", "3", "--image_resolution", "low"]
    assert eval_mmeb.main(flags(folder, tmp_path, *more, subsets=["vqa"])) == 0
    assert (tmp_path / "OK-VQA_errors.html").exists()
    assert (tmp_path / "leaderboard.json").exists()
    assert not (tmp_path / "WebQA_score.json").exists()


def test_another_base_under_the_same_adapter_is_another_model(folder: Path, tmp_path: Path) -> None:
    from b3.model.checkpoint import adapter_key, checkpoint_key

    base, repository = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(folder, base)
    shutil.copytree(GOLDEN / "adapter-dora", repository)
    config = json.loads((repository / "adapter_config.json").read_text())
    (repository / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    before, alone = checkpoint_key(repository), adapter_key(repository)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1  # one bit, same size
    (base / "model.safetensors").write_bytes(weights)
    assert checkpoint_key(repository) != before
    assert adapter_key(repository) == alone
