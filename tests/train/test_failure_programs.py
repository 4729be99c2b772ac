"""Mining and evaluation end as training does when one rank of three fails."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import tiny
from faults import Fault, disk_full, kill, out_of_memory
from forks import Job

START_UP, SECONDS = 600.0, 120.0
ENCODE = "b3.model.encode:Encoder._encode_batches"
MEMORY = "out of GPU memory: lower "
KILLED = "rank 1 has ended without a message (it was killed; look for memory)"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder, mining={"teacher": str(folder / "model")}, batch={"policy": "b3"})
    return folder


def arguments(root: Path, program: str, out: Path) -> list[str]:
    if program == "scripts.mine":
        return [str(root / "recipe.yaml"), f"mining.dir={out}"]
    data = ["--dataset_name", str(root / "data"), "--image_dir", str(root / "data" / "images.parquet")]
    return ["--model_name", str(root / "model"), *data, "--subset_name", "words", "--encode_output_path", str(out)]


@pytest.mark.parametrize(
    ("program", "fault", "code", "said", "news"),
    [
        (
            "scripts.mine",
            Fault(out_of_memory, ENCODE, call=2),
            2,
            MEMORY + "mining.batch_tokens",
            "rank 1 has ended: out",
        ),
        ("scripts.mine", Fault(kill, ENCODE, call=2), -signal.SIGKILL, None, KILLED),
        (
            "scripts.mine",
            Fault(disk_full, "b3.files:Stages.save", 0, 1),
            2,
            "the disk is full",
            "rank 0 has ended: the",
        ),
        ("eval_mmeb", Fault(out_of_memory, ENCODE, call=1), 2, MEMORY + "--batch_tokens", "rank 1 has ended: out of"),
        ("eval_mmeb", Fault(kill, ENCODE, call=1), -signal.SIGKILL, None, KILLED),
    ],
    ids=["mining, memory", "mining, killed", "mining, disk", "evaluation, memory", "evaluation, killed"],
)
def test_all_ranks_end(
    root: Path, tmp_path: Path, program: str, fault: Fault, code: int, said: str | None, news: str
) -> None:
    job = Job(tmp_path, *arguments(root, program, tmp_path / "out"), ranks=3, program=program, prepare=fault)
    try:
        job.processes[fault.rank].join(START_UP)
        assert job.processes[fault.rank].exitcode == code, job.text(fault.rank)
    finally:
        codes = job.wait(SECONDS)
    assert codes == [code if rank == fault.rank else 2 for rank in range(3)], [job.text(rank) for rank in range(3)]
    if said is not None:
        assert f"[rank {fault.rank}] error: {said}" in job.text(fault.rank)
        assert "Traceback" not in job.text(fault.rank)
    for rank in {0, 1, 2} - {fault.rank}:
        (line,) = [line for line in job.text(rank).splitlines() if "error: " in line]
        assert line.startswith(f"[rank {rank}] error: {news}"), line
