"""The SLURM script, with stand-ins for srun and scontrol: which exit codes of the ranks requeue the job."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from b3.errors import EXIT_STOPPED

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Commands that note how they were called; srun runs one task and gives its exit code."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    commands = {
        tools / "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=8 exec "$@"',
        tools / "scontrol": '[ "$1" = show ] && echo node7 && exit; echo "$@" >> calls',
        tmp_path / ".venv" / "bin" / "python": (
            'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" > task; trap "exit 85" USR1; touch ready\n'
            'for _ in $(seq "${WAIT:-0}"); do sleep 0.05; done; exit "$CODE"'
        ),
    }
    for file, text in commands.items():
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[7-8]",
    }  # fmt: skip


def requeued(folder: Path) -> bool:
    calls = folder / "calls"
    return calls.exists() and calls.read_text() == "requeue 12345\n"


@pytest.mark.parametrize(
    ("code", "ends", "again"), [(0, 0, False), (EXIT_STOPPED, 0, True), (2, 2, False), (1, 1, False)]
)
def test_only_a_stopped_run_is_requeued(
    tmp_path: Path, cluster: dict[str, str], code: int, ends: int, again: bool
) -> None:
    run = subprocess.run(["bash", str(SCRIPT), "a.yaml", "train.lr=1"], env={**cluster, "CODE": str(code)}, timeout=30)
    assert run.returncode == ends
    assert requeued(tmp_path) is again
    assert (tmp_path / "task").read_text() == "3 1 8 node7 train.py a.yaml train.lr=1\n"


def test_a_signal_that_reaches_the_script_too_waits_for_the_ranks(tmp_path: Path, cluster: dict[str, str]) -> None:
    process = subprocess.Popen(["bash", str(SCRIPT)], env={**cluster, "CODE": str(EXIT_STOPPED), "WAIT": "10"})
    end = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    assert requeued(tmp_path)
