"""Arrays go from rank to rank in blocks of bounded size and arrive as the same bytes; which backends a group has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from forks import Job

from b3 import distributed
from b3.errors import RunError
from b3.model.checkpoint import choose_device


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_arrays_are_gathered_in_blocks(tmp_path: Path, ranks: int) -> None:
    job = Job(tmp_path, ranks=ranks, program="rank_programs:gather")
    assert job.wait() == [0] * ranks, "".join(map(job.text, range(ranks)))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """A machine that shows so many GPUs."""

    def show(count: int, **variables: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name in ("LOCAL_RANK", "WORLD_SIZE", "TORCH_NCCL_BLOCKING_WAIT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return show


def test_a_rank_takes_its_gpu_or_the_only_one_that_it_sees(gpus) -> None:
    gpus(8, LOCAL_RANK="3")
    assert choose_device(None) == torch.device("cuda", 3)
    gpus(1, LOCAL_RANK="3")  # as `srun --gpus-per-task=1`
    assert choose_device(None) == torch.device("cuda", 0)
    gpus(2, LOCAL_RANK="3")
    with pytest.raises(RunError, match="rank 3 of this machine has no GPU, 2 are visible; start at most 2 ranks"):
        choose_device(None)


def test_one_process_on_several_gpus_says_so(gpus, capsys: pytest.CaptureFixture[str]) -> None:
    for count in (0, 1):
        gpus(count)
        distributed.start()
        assert capsys.readouterr().out == ""
    gpus(8)
    distributed.start()
    assert capsys.readouterr().out == "note: one of 8 GPUs is used; for all: torchrun --nproc_per_node=gpu ...\n"


@pytest.mark.parametrize(
    ("given", "overlap", "waits"), [(None, False, "1"), (None, True, "0"), ("0", False, "0"), ("1", True, "1")]
)
def test_a_group_on_gpus_has_gloo_for_the_host(gpus, monkeypatch, given: str | None, overlap: bool, waits: str) -> None:
    import torch.distributed as dist

    gpus(2, WORLD_SIZE="2", LOCAL_RANK="1", **({} if given is None else {"TORCH_NCCL_BLOCKING_WAIT": given}))
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: calls.append((backend, options)))
    monkeypatch.setattr(distributed.peers, "start", lambda *arguments: None)
    monkeypatch.setattr(distributed, "note_shared_memory", lambda: None)
    distributed.start(5, overlap)
    ((backend, options),) = calls
    assert backend == "cpu:gloo,cuda:nccl" and options["device_id"] == torch.device("cuda", 1)
    assert options["timeout"].total_seconds() == 300
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == waits


def test_little_shared_memory_is_said_once_on_a_machine(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Room:
        f_bavail, f_frsize = 16384, 4096

    monkeypatch.setattr(os, "statvfs", lambda folder: Room)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        distributed.note_shared_memory()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "note: 64 MiB are free in /dev/shm and NCCL may need 512; start the container with --shm-size"
    )
