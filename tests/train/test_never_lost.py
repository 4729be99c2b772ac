"""Signals, kills at random moments, ranks that die: nothing that a cluster does changes the result of a run."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from forks import Job
from safetensors.torch import load_file

from b3.errors import EXIT_STOPPED
from b3.train.checkpoint import is_complete, newest_checkpoint

STEPS = 10
NOISY = ("adapter.dropout=0.2", "adapter.use_dora=true", f"train.steps={STEPS}", "train.log_every=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never-lost")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


def job(root: Path, run: str, *overrides: str, ranks: int = 1) -> Job:
    return Job(root / "logs" / run, str(root / "recipe.yaml"), f"output_dir={root / run}", *overrides, ranks=ranks)


def lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_equal_runs(one: Path, other: Path) -> None:
    assert tiny.without_times(lines(one)) == tiny.without_times(lines(other))
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def whole(root: Path, request: pytest.FixtureRequest) -> tuple[int, Path]:
    """An uninterrupted run with dropout and DoRA, and its number of ranks."""
    ranks = request.param
    started = job(root, f"whole-{ranks}", *NOISY, ranks=ranks)
    assert started.wait() == [0] * ranks, started.text()
    return ranks, root / f"whole-{ranks}"


@pytest.mark.parametrize("draw", [pytest.param(0, marks=pytest.mark.core), 1])
def test_sigkill_at_random_moments_changes_nothing(root: Path, whole: tuple[int, Path], draw: int) -> None:
    """Killed again and again, at moments drawn over start-up, steps, checkpoints and the end; then left to finish."""
    ranks, reference = whole
    run, moments = f"killed-{ranks}-{draw}", random.Random(100 * ranks + draw)
    folder, kills = root / run, 0
    for _ in range(4):
        started = job(root, run, *NOISY, "train.save_every=1", ranks=ranks)
        logged = len(lines_safe(folder))
        moment, after = moments.uniform(0.0, 0.15), moments.choice([0, 1, 1, 2])
        reached = started.when(lambda seen=logged + after: has_lines(folder, seen))
        time.sleep(moment if reached else 0)
        started.kill()
        kills += any(code == -signal.SIGKILL for code in started.wait())
        newest = newest_checkpoint(folder)
        assert newest is None or is_complete(newest)
        assert all(is_complete(p) for p in folder.glob("checkpoint-*")), "a torn checkpoint is visible"
    assert kills >= 2, "the run ended before it could be killed"
    started = job(root, run, *NOISY, "train.save_every=1", ranks=ranks)
    assert started.wait() == [0] * ranks, started.text()
    assert_equal_runs(folder, reference)


def has_lines(folder: Path, count: int) -> bool:
    return (folder / "config.yaml").exists() and len(lines_safe(folder)) >= count


def lines_safe(folder: Path) -> list[str]:
    try:
        return (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    root: Path, whole: tuple[int, Path], number: signal.Signals
) -> None:
    ranks, reference = whole
    run = f"stopped-{ranks}-{number.name}"
    overrides = (*NOISY, "train.save_every=1000", "train.workers=1")
    started = job(root, run, *overrides, ranks=ranks)
    assert started.when(lambda: len(lines_safe(root / run)) >= 1), started.text()
    started.signal(number, ranks - 1)
    assert started.wait() == [EXIT_STOPPED] * ranks, started.text()
    newest = newest_checkpoint(root / run)
    assert newest is not None and 2 <= int(newest.name.split("-")[1]) < STEPS
    assert not (root / run / "result.json").exists()
    assert "stopped as asked" in started.text()
    started = job(root, run, *overrides, ranks=ranks)
    assert started.wait() == [0] * ranks, started.text()
    assert_equal_runs(root / run, reference)


def test_a_signal_during_start_up_stops_before_the_first_step(root: Path) -> None:
    started = job(root, "early", *NOISY)
    assert started.when(lambda: (root / "early" / "config.yaml").exists())
    started.signal(signal.SIGTERM, 0)
    (code,) = started.wait()
    assert code == EXIT_STOPPED
    done = len(lines_safe(root / "early"))
    assert done <= 2 and (done == 0) == (newest_checkpoint(root / "early") is None)


def test_the_last_checkpoints_are_kept(whole: tuple[int, Path]) -> None:
    _, folder = whole
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 2}"]
    assert not (folder / ".saving").exists()


@pytest.mark.core
def test_a_rank_that_dies_ends_the_others_by_name(root: Path) -> None:
    overrides = ("train.steps=2000", "train.save_every=1", "train.timeout_minutes=0.5")
    started = job(root, "dead", *overrides, ranks=2)
    assert started.when(lambda: len(lines_safe(root / "dead")) >= 2), started.text()
    started.signal(signal.SIGKILL, 1)
    codes = started.wait(20)
    assert codes == [2, -signal.SIGKILL], started.text()
    errors = [line for line in started.text().splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith(
        "[rank 0] error: rank 1 has ended without a message (it was killed"
    )
    assert "Traceback" not in started.text()


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(root: Path) -> None:
    started = job(root, "hung", "train.steps=2000", "train.timeout_minutes=0.05", ranks=2)
    assert started.when(lambda: len(lines_safe(root / "hung")) >= 2), started.text()
    started.signal(signal.SIGSTOP, 1)
    started.processes[0].join(20)
    assert started.processes[0].exitcode == 2, started.text()
    started.kill()
    assert re.search(r"another rank ended or does not answer|rank 1 has not answered for 3 seconds", started.text())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.size=24"], "batch.size was 12, now 24"),
        (["seed=1"], "seed was 0, now 1"),
        (["train.steps=20"], "train.steps was 10, now 20); choose another output_dir or delete it; more steps need"),
        (["train.lr=1.0", "seed=1"], "seed was 0, now 1; train.lr was 0.01, now 1.0"),
        (["data.datasets.0.max_rows=90"], "data.datasets was"),
        (["data.source=parquet:{root}/other"], "data.source was"),
        (["data.source=parquet:{root}/data"], "data words.fingerprint was"),
    ],
)
def test_resuming_as_another_run_names_the_difference(
    root: Path, half: Path, overrides: list[str], message: str
) -> None:
    """With its data changed in place, or anything that decides the result."""
    words = next((root / "data" / "words").glob("train*.parquet"))
    kept = words.read_bytes()
    other = root / "other"
    if not other.exists():
        tiny.write_data(other)
    if "fingerprint" in message:
        table = pq.read_table(words)
        pq.write_table(table.set_column(0, "qry", pa.array(table["qry"].to_pylist()[::-1])), words)
    try:
        started = job(root, "half", *NOISY, *(o.format(root=root) for o in overrides))
        assert started.wait() == [2], started.text()
    finally:
        words.write_bytes(kept)
    assert message in started.text()


@pytest.fixture(scope="module")
def half(root: Path) -> Path:
    """A run that was stopped after a few of its steps."""
    started = job(root, "half", *NOISY)
    assert started.when(lambda: len(lines_safe(root / "half")) >= 1)
    started.signal(signal.SIGTERM, 0)
    assert started.wait() == [EXIT_STOPPED]
    return root / "half"


def copy_run(source: Path, target: Path) -> Path:
    """The run folder under another name, as if it had been moved."""
    return Path(shutil.copytree(source, target))


def test_killed_while_the_results_are_written(root: Path, whole: tuple[int, Path]) -> None:
    """All steps are done, but not all files: they are written again, without another step."""
    ranks, reference = whole
    run = copy_run(reference, root / f"end-{ranks}")
    for name in ("result.json", "report.html", "adapter_model.safetensors"):
        (run / name).unlink()
    started = job(root, run.name, *NOISY, ranks=ranks)
    assert started.wait() == [0] * ranks, started.text()
    assert (run / "result.json").exists() and (run / "report.html").exists()
    assert_equal_runs(run, reference)


def test_resuming_with_other_ranks_and_chunks_is_allowed_and_said(root: Path, half: Path) -> None:
    copy_run(half, root / "half-2")
    started = job(root, "half-2", *NOISY, "train.chunk_tokens=64", ranks=2)
    assert started.wait() == [0, 0], started.text()
    assert "note: 2 ranks where 1 were: the same batches" in started.text()
    assert "note: train.chunk_tokens was 128, now 64: equal up to rounding" in started.text()


def test_more_steps_at_a_constant_rate_equal_a_longer_run(root: Path) -> None:
    constant = ("train.schedule=constant", "adapter.dropout=0.2")
    for run, count in (("long", 6), ("longer", 3), ("longer", 6)):
        started = job(root, run, *constant, f"train.steps={count}")
        assert started.wait() == [0], started.text()
    assert "train.steps was 3, now 6: a constant learning rate goes on" in started.text()
    assert_equal_runs(root / "longer", root / "long")


def test_what_a_killed_deletion_left_is_no_obstacle(tmp_path: Path) -> None:
    from b3.train.checkpoint import mark_complete, prune

    for name in ("checkpoint-1", "checkpoint-2", ".removed-checkpoint-1", ".removed-checkpoint-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
        mark_complete(tmp_path / name, {})
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
