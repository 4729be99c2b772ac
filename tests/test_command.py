"""How a command ends on an error, where there is one process; tests/test_peers.py has several."""

from __future__ import annotations

import errno
import os
from functools import partial

import pytest
import torch

from b3.errors import DataError, command


def run(error: BaseException, memory: str = "give less") -> int:
    @partial(command, memory=memory)
    def main() -> int:
        raise error

    return main()


OOM = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB\nsecond line"
CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("row 3 is empty"), "error: row 3 is empty"),
        (torch.OutOfMemoryError(OOM), f"error: out of GPU memory: give less ({OOM.splitlines()[0]})"),
        (RuntimeError(CPU), f"error: out of memory: give less ({CPU})"),
        (MemoryError(), "error: out of memory: give less (MemoryError)"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.npy"),
            "error: the disk is full: [Errno 28] No space left on device: 'a.npy'; free space, then run the same"
            " command again to continue",
        ),
    ],
)
def test_what_a_user_can_help_is_one_line_and_code_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run(error) == 2
    assert capsys.readouterr().err == line + "\n"


def test_an_interrupt_has_the_code_of_shells(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyboardInterrupt()) == 130
    assert "run the same command again to continue" in capsys.readouterr().err


@pytest.mark.parametrize("error", [IndexError("a bug"), RuntimeError("gloo is a word"), FileNotFoundError("x")])
def test_a_mistake_in_the_program_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(error)


def test_ranks_that_have_not_met_name_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert run(DataError("row 3 is empty")) == 2
    assert capsys.readouterr().err == "[rank 3] error: row 3 is empty\n"


@pytest.mark.parametrize(
    ("program", "option"),
    [("train", "train.chunk_tokens"), ("eval_mmeb", "--batch_tokens"), ("scripts.embed", "--batch-tokens"),
     ("scripts.mine", "mining.batch_tokens")],
)  # fmt: skip
def test_the_option_that_lowers_memory_exists(program: str, option: str) -> None:
    """And is the one that the command names."""
    from importlib import import_module

    from b3.config import describe_keys

    module = import_module(program)
    names = describe_keys() if "." in option else " ".join(module.build_parser(*_doc(program))._option_string_actions)
    assert option in names
    with open(str(module.__file__)) as source:
        assert f'@partial(command, memory="lower {option}' in source.read()


def _doc(program: str) -> tuple[str, ...]:
    return ("",) if program == "eval_mmeb" else ()
