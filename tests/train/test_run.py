"""A whole run: what it leaves, several ranks against one, and what a user is told when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from forks import Job
from processes import run_python
from safetensors.torch import load_file

from b3.train import BatchPlanSampler
from b3.train.checkpoint import mark_complete
from b3.train.sampler import random_rows
from train import main

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


def start(root: Path, run: str, *overrides: str, ranks: int = 1) -> Ended:
    job = Job(root / "logs" / run, str(root / "recipe.yaml"), f"output_dir={root / run}", *overrides, ranks=ranks)
    codes = job.wait()
    return Ended(max(code if code is not None else 99 for code in codes), job.text())


class Ended(NamedTuple):
    """What a run leaves to a shell: the highest exit code, and what the first rank wrote."""

    returncode: int
    output: str


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """An uninterrupted run with dropout and DoRA."""
    result = start(root, "whole", "adapter.dropout=0.2", "adapter.use_dora=true")
    assert result.returncode == 0, result.output
    return root / "whole"


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    names = {p.name for p in whole.iterdir()}
    expected = "config.yaml environment.json metrics.jsonl adapter_config.json adapter_model.safetensors README.md"
    assert names >= {*expected.split(), f"checkpoint-{STEPS}"}
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] != lines[0]["loss"]


def test_a_run_builds_one_sampler(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    original = BatchPlanSampler.__init__

    def init(self: BatchPlanSampler, *arguments: Any, **options: Any) -> None:
        built.append(1)
        original(self, *arguments, **options)

    monkeypatch.setattr(BatchPlanSampler, "__init__", init)
    assert main([str(root / "recipe.yaml"), f"output_dir={root / 'one-sampler'}", "train.steps=1"]) == 0
    assert len(built) == 1


# Every file that a run may leave: nothing of it can execute.
OF_ADAPTER = ["adapter_model.safetensors", "adapter_config.json"]
OF_WHOLE_MODEL = ["model.safetensors", "generation_config.json"]
OF_MODEL = "config.json preprocessor_config.json b3_settings.json modules.json".split()
OF_MODEL += ["config_sentence_transformers.json"]
OF_TOKENIZER = "tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json".split()
OF_CHECKPOINT = "optimizer.safetensors random.json complete.json".split()
OF_RUN = "config.yaml data.json environment.json metrics.jsonl result.json README.md report.html".split()


@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_file_that_a_run_leaves_is_known_and_opens(root: Path, kind: str, ranks: int) -> None:
    run = root / f"files-{kind}-{ranks}"
    result = start(root, run.name, f"model.train={kind}", ranks=ranks)
    assert result.returncode == 0, result.output
    weights = OF_ADAPTER if kind == "adapter" else OF_WHOLE_MODEL
    files = [file for file in run.rglob("*") if file.is_file()]
    for file in files:
        place = str(file.parent.relative_to(run))
        known = OF_RUN if place == "." else OF_CHECKPOINT if place.startswith("checkpoint-") else []
        assert file.name in [*known, *weights, *OF_MODEL, *OF_TOKENIZER], f"{file} is no file that a run should leave"
        if file.suffix == ".safetensors":
            assert load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            assert metrics(run)
        elif file.suffix == ".yaml":
            assert yaml.safe_load(file.read_text())
        else:
            assert file.suffix in (".md", ".html", ".jinja") and file.read_text()
    for folder in (run, run / f"checkpoint-{STEPS}"):
        names = {file.name for file in folder.iterdir()}
        assert names >= {weights[0], *OF_MODEL, *(OF_RUN if folder == run else OF_CHECKPOINT)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensorboard_reads_the_numbers_of_the_log(root: Path, ranks: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = root / f"tensorboard-{ranks}"
    result = start(root, run.name, "train.trackers=[tensorboard]", ranks=ranks)
    assert result.returncode == 0, result.output
    (events,) = (run / "runs" / "test").glob("events.out.tfevents.*")  # of the first rank alone
    reader = EventAccumulator(str(events)).Reload()
    lines = metrics(run)
    names = {name for name, value in lines[0].items() if isinstance(value, (int, float))}
    assert set(reader.Tags()["scalars"]) == {f"train/{name}" for name in names}
    for name in names:
        scalars = reader.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_moments_are_stored_by_parameter_name(whole: Path) -> None:
    adapter = load_file(whole / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    moments = load_file(whole / f"checkpoint-{STEPS}" / "optimizer.safetensors")
    kinds = [key.partition("/")[0] for key in moments]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), len(adapter))
    shapes = sorted(tuple(v.shape) for k, v in moments.items() if k.startswith("exp_avg/"))
    assert shapes == sorted(tuple(v.shape) for v in adapter.values())
    states = json.loads((whole / f"checkpoint-{STEPS}" / "random.json").read_text())
    assert len(states) == 1 and len(states[0]["python"][1]) == 625 and len(states[0]["torch"]) > 600


def test_a_checkpoint_with_pickled_state_is_one_line(root: Path, whole: Path) -> None:
    """Of a version that left them to `transformers.Trainer`."""
    folder = root / "pickled"
    shutil.copytree(whole, folder)
    for file in [*folder.glob("checkpoint-*/optimizer.safetensors"), folder / "result.json"]:
        file.unlink()
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace(str(whole), str(folder)))
    for checkpoint in folder.glob("checkpoint-*"):
        mark_complete(checkpoint, {"step": int(checkpoint.name.split("-")[1]), "world_size": 1, "window": []})
    result = start(root, "pickled", "adapter.dropout=0.2", "adapter.use_dora=true")
    assert result.returncode == 2 and "Traceback" not in result.output
    assert f"checkpoint-{STEPS} is a checkpoint of an earlier b3" in result.output


def test_a_torn_checkpoint_is_passed_over(root: Path, whole: Path) -> None:
    from b3.train.checkpoint import newest_checkpoint

    newest = newest_checkpoint(whole)
    assert newest is not None and newest.name == f"checkpoint-{STEPS}"
    weights = newest / "adapter_model.safetensors"
    data = weights.read_bytes()
    try:
        weights.write_bytes(data[:-10])
        older = newest_checkpoint(whole)
        assert older is not None and older.name == f"checkpoint-{STEPS - 2}"
    finally:
        weights.write_bytes(data)
    marker = newest / "complete.json"
    text = marker.read_text()
    try:
        marker.unlink()
        assert newest_checkpoint(whole) == older
    finally:
        marker.write_text(text)


def test_a_complete_run_is_left_alone(root: Path, whole: Path) -> None:
    before = (whole / "adapter_model.safetensors").stat().st_mtime_ns
    result = start(root, "whole", "adapter.dropout=0.2", "adapter.use_dora=true")
    assert result.returncode == 0
    assert "complete" in result.output
    assert (whole / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def single(root: Path) -> Path:
    result = start(root, "single")
    assert result.returncode == 0, result.output
    return root / "single"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_losses_of_one_process(root: Path, single: Path, ranks: int) -> None:
    result = start(root, f"ranks-{ranks}", ranks=ranks)
    assert result.returncode == 0, result.output
    for ours, theirs in zip(metrics(root / f"ranks-{ranks}"), metrics(single), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["in_batch_precision"] == pytest.approx(theirs["in_batch_precision"])
    one, many = (load_file(f / "adapter_model.safetensors") for f in (single, root / f"ranks-{ranks}"))
    assert max(float((one[name] - many[name]).abs().max()) for name in one) < 1e-3


def test_workers_change_nothing(root: Path, single: Path) -> None:
    result = start(root, "workers", "train.workers=2")
    assert result.returncode == 0, result.output
    assert tiny.without_times(metrics(root / "workers")) == tiny.without_times(metrics(single))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=1"], "did you mean 'train.steps'"),
        (["batch.policy=b3", "batch.size=10"], "not a multiple of mining.k 4; use 8 or 12"),
        (["batch.size=1000"], "fewer than the batch size"),
        (["batch.policy=b3"], "no batch plan in"),
        (["data.datasets.0.subset=nothing"], "subsets there: pictures, words"),
        (["data.image_dir=/nowhere"], "image_dir /nowhere does not exist"),
        (["model.name=/nowhere"], "does not exist"),
        (["adapter.r=3", "model.init_adapter={root}/single"], "copy r, use_dora and target_modules"),
        (["output_dir={root}/recipe.yaml/run"], "cannot be written (Not a directory); choose another"),
        (["adapter.r=3", "resume=never", "output_dir={root}/single"], "resume is 'never'"),
        (["adapter.r=3", "output_dir={root}/single"], "holds another run (adapter.r was 4, now 3)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    root: Path, single: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    given = [o.format(root=root) for o in overrides]
    assert main([str(root / "recipe.yaml"), f"output_dir={root / 'mistake'}", *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]


def test_a_checkpoint_whose_deletion_was_cut_off_is_deleted(root: Path, tmp_path: Path) -> None:
    """A power failure brings it back, and a run that had saved its last step does not save again."""
    overrides = ["data.datasets=[{subset: words}]", f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    assert start(root, "unused", *overrides).returncode == 0
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / ".removed-checkpoint-0").mkdir()
    assert start(root, "unused", *overrides).returncode == 0
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / ".removed-checkpoint-0").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_and_costs_no_step(root: Path, tmp_path: Path, workers: int) -> None:
    """The run stops at the batch with the broken image, and goes on from there once it is mended."""
    whole = pq.read_table(root / "data" / "images.parquet").to_pylist()
    images = tmp_path / "images"
    images.mkdir()
    for row in whole:
        (images / row["path"]).write_bytes(row["bytes"])
    overrides = [f"data.image_dir={images}", "data.datasets=[{subset: pictures}]", f"output_dir={tmp_path / 'run'}",
                 "train.save_every=100", f"train.workers={workers}"]  # fmt: skip
    broken = whole[BatchPlanSampler(random_rows(96), 12).batch(3)[0, 1]]["path"]
    (images / broken).write_bytes(b"no image")
    result = start(root, "unused", *overrides)
    assert result.returncode == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"image {broken} in {images} does not decode" in lines[0] and "pictures row" in lines[0]
    assert "Traceback" not in result.output
    assert (tmp_path / "run" / "checkpoint-3" / "complete.json").exists()
    (images / broken).write_bytes(next(row["bytes"] for row in whole if row["path"] == broken))
    assert start(root, "unused", *overrides).returncode == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_more_ranks_than_rows_is_refused(root: Path) -> None:
    job = Job(root / "logs" / "many", str(root / "recipe.yaml"), variables={"WORLD_SIZE": "16", "RANK": "0"})
    assert job.wait() == [2]
    assert "batch.size 12 does not divide over 16 ranks" in job.text()


def test_torchrun_starts_it(root: Path, single: Path) -> None:
    """From a shell, as a user does; the other tests fork their processes."""
    result = run_python("train.py", root / "recipe.yaml", f"output_dir={root / 'torchrun'}", ranks=2, timeout=300)
    assert result.stdout.count("done: weights") == 1
    for ours, theirs in zip(metrics(root / "torchrun"), metrics(single), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
