"""The SLURM scripts, with stand-ins for srun and scontrol: what they start, and which exit codes requeue a job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from b3.errors import EXIT_STOPPED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "slurm"
SCRIPT = FOLDER / "train.sbatch"


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


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_job_files_are_bash_and_name_options_of_sbatch(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    lines = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("#SBATCH")]
    # https://slurm.schedmd.com/sbatch.html
    known = set(
        "--job-name --nodes --ntasks --ntasks-per-node --gpus --gpus-per-node --cpus-per-task --time --signal --requeue"
        " --open-mode --output --array".split()
    )
    assert {line.partition("=")[0] for line in lines} <= known
    assert "--requeue" in lines


def test_mining_starts_a_rank_for_each_task_and_ends_with_its_code(tmp_path: Path, cluster: dict[str, str]) -> None:
    for code in (0, 2):
        script = ["bash", str(FOLDER / "mine.sbatch"), "a.yaml", "mining.m=9"]
        assert subprocess.run(script, env={**cluster, "CODE": str(code)}, timeout=300).returncode == code
        assert (tmp_path / "task").read_text() == "3 1 8 node7 scripts/mine.py a.yaml mining.m=9\n"
    assert not requeued(tmp_path)


def test_mining_is_requeued_before_its_time_is_up(tmp_path: Path, cluster: dict[str, str]) -> None:
    process = subprocess.Popen(["bash", str(FOLDER / "mine.sbatch")], env={**cluster, "CODE": "0", "WAIT": "10"})
    end = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)  # to the script alone: --signal=B:USR1
    process.wait(120)
    assert requeued(tmp_path)


@pytest.mark.parametrize("file", ["mine.sbatch", "train.sbatch"])
def test_the_recipe_that_is_taken_by_default_exists(file: str) -> None:
    (config,) = re.findall(r"set -- (\S+)", (FOLDER / file).read_text())
    assert (ROOT / config).is_file()


def evaluated(folder: Path, cluster: dict[str, str], task: int, tasks: int) -> list[str]:
    """Arguments with which a task of the array starts eval_mmeb.py."""
    array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(tasks), "SLURM_CPUS_PER_TASK": "8"}
    flags = ["--model_name", "m", "--encode_output_path", "out", "--image_dir", "i", "--bf16", "--tgt_prefix_mod"]
    subprocess.run(["bash", str(FOLDER / "eval.sbatch"), *flags], env={**cluster, **array}, check=True, timeout=300)
    words = (folder / "calls.py").read_text().splitlines()
    (folder / "calls.py").unlink()
    return words


def test_tasks_of_an_evaluation_share_the_subsets(tmp_path: Path, cluster: dict[str, str]) -> None:
    """Each subset is of one task, every option is one of the program, and the list is that of the benchmark."""
    import eval_mmeb
    from b3 import registry

    (tmp_path / ".venv" / "bin" / "python").write_text(
        f'#!/bin/bash\n[ "$1" != -c ] || PYTHONPATH={ROOT} exec {sys.executable} "$@"\nprintf "%s\\n" "$@" > calls.py\n'
    )
    subsets: list[str] = []
    for task in range(5):
        program, *words = evaluated(tmp_path, cluster, task, 5)
        assert program == "eval_mmeb.py"
        arguments, unknown = eval_mmeb.build_parser(None).parse_known_args(words)
        assert not unknown and arguments.dataloader_num_workers == 7 and arguments.bf16
        subsets += arguments.subset_name
    assert sorted(subsets) == sorted(registry.load("benchmark", "mmeb").names)
    _, *words = evaluated(tmp_path, {**cluster, "SUBSETS": "CIRR VOC2007 DocVQA"}, 1, 2)
    assert eval_mmeb.build_parser(None).parse_args(words).subset_name == ["VOC2007"]


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_options_in_comments_exist(file: Path) -> None:
    import eval_mmeb

    parser = eval_mmeb.build_parser(None)
    own = {"--nodes", "--ntasks-per-node", "--requeue", "--array", "--dependency", "--subset_name"}
    comments = "\n".join(line for line in file.read_text().splitlines() if line.startswith("# "))
    for option in re.findall(r"--[a-z0-9_-]+", comments):
        assert option in own or option in parser._option_string_actions, option
