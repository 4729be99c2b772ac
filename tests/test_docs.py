"""The pages: a command is run by a test or says why not, and parses as it stands; code on pages is code that runs."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from b3.__main__ import PROGRAMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTED = {  # program -> the test that runs it
    "train": "tests/train/test_run.py",
    "eval_mmeb": "tests/eval/test_eval_mmeb.py",
    "scripts.mine": "tests/mining/test_recipe.py",
    "scripts.embed": "tests/data/test_own.py",
    "scripts.search": "tests/data/test_own.py",
    "scripts.export": "tests/scripts/test_export.py",
    "scripts.own_data": "tests/scripts/test_own_data.py",
    "scripts.prepare_mmeb": "tests/scripts/test_prepare_mmeb.py",
    "scripts.import_plan": "tests/mining/test_released.py",
    "scripts.vllm_conformance": "tests/scripts/test_vllm_conformance.py",
    "b3.eval.compare": "tests/eval/test_compare.py",
    "b3.integrations.hub": "tests/integrations/test_hub.py",
    "b3.integrations.mteb": "tests/integrations/test_mteb.py",
    "b3.__main__": "tests/test_console_command.py",
}
NOT_RUN = {  # how other commands begin -> why no test runs them
    "make ": "the makefile's targets are what the checks themselves run, and what a person starts",
    ".ci/run": "it runs the tests",
    "pip install": "needs a package index",
    "apt": "needs a package index",
    "python3 -m venv": "makes an environment",
    ". .venv": "enters it",
    "hf auth login": "needs an account",
    "vllm serve": "vLLM could not be installed; docs/integrations.md says so",
    "sbatch": "needs SLURM; tests/train/test_slurm.py runs the job files with a stand-in",
    "accelerate launch": "tests/train/test_shard.py reads its configurations",
    "docker": "needs docker",
    "python -m benchmarks": "measures; nothing to check",
}


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of each line of each ```bash block, continuations joined, comments and options in [] left out."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    text = re.sub(r"\s#\s.*$|\s\[[^\]]*\]", "", f" {part}").strip()
                    if text and not text.startswith("#"):
                        yield page.relative_to(ROOT).as_posix(), " ".join(text.split())


COMMANDS = sorted(set(commands()))


def program_of(command: str) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command of ours; None for another's."""
    words = shlex.split(command.replace("$'", "'"))
    words = words[1:] if words[0].startswith("OMP_") else words
    if words[0] == "torchrun":
        words = [
            "python",
            *words[next(i for i, w in enumerate(words) if i and (not w.startswith("--") or w == "-m")) :],
        ]
    if words[0] == "b3":
        words = ["python", "-m", "b3", *words[1:]]
    if words[:2] == ["python", "-m"]:
        module, rest = words[2], words[3:]
    elif words[0] == "python" and words[1].endswith(".py"):
        module, rest = words[1].removesuffix(".py").replace("/", "."), words[2:]
    else:
        return None
    if module == "b3":
        name = rest[0] if rest else ""
        if name in PROGRAMS:
            is_own = name == "train" and "--pairs" in rest
            return "scripts.own_data" if is_own else PROGRAMS[name], rest[1:]
        module = "b3.__main__"
    return module, rest


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_each_command_is_run_by_a_test_or_says_why_not(page: str, command: str) -> None:
    found = program_of(command)
    if found is None or not (ROOT / f"{found[0].replace('.', '/')}.py").exists():
        assert any(command.startswith(start) for start in NOT_RUN), f"{page}: say in NOT_RUN why '{command}' is not run"
        return
    module, _ = found
    assert module in TESTED or module.startswith("benchmarks"), f"{page}: which test runs {module}?"
    if module in TESTED:
        name = {"__main__": "main", "own_data": '"train", '}.get(module.rpartition(".")[2], module.rpartition(".")[2])
        assert name in (ROOT / TESTED[module]).read_text(), f"{TESTED[module]} does not run {module}"


class Parsed(Exception):
    """Arguments were understood."""


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_each_command_of_ours_parses(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own parser takes it, and recipes that it names exist."""
    found = program_of(command)
    if found is None or found[0] not in TESTED or "..." in command or found[0] == "b3.__main__":
        return
    module, arguments = found
    if module == "b3.integrations.mteb":
        pytest.importorskip("mteb")
    for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, *given: object, original: object = original, **options: object):
            monkeypatch.undo()
            original(self, *given, **options)  # type: ignore[operator]
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    with pytest.raises((Parsed, SystemExit)) as caught:
        import_module(module).main(arguments)
    assert caught.type is Parsed or caught.value.code == 0, f"{page}: {command}"
    for word in arguments:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{page}: {word} does not exist"


def test_the_pages_show_the_parts_that_tests_run() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    toys = [(ROOT / "tests" / "train" / "toy_loss.py").read_text()]
    for file, quote in (("mining/test_toy_miner.py", "'''"), ("eval/test_toy_benchmark.py", '"""')):
        found = re.search(f"TOY = {quote}\n(.*?){quote}", (ROOT / "tests" / file).read_text(), re.S)
        assert found is not None
        toys.append(found[1])
    for toy in toys:  # blank lines aside, which the formatter adds on pages
        lines = [line for line in toy.splitlines() if line]
        shown = "\n".join(line for line in page.splitlines() if line)
        assert "\n".join(lines) in shown, "docs/extending.md shows another version of a toy part"


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": ([a-z0-9_]+\.md)$", text, re.M))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_what_the_reference_names_exists() -> None:
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M):
        module, _, attribute = name.rpartition(".")
        if "integrations" in module:
            pytest.importorskip("mteb")
        assert hasattr(import_module(module), attribute) and getattr(import_module(module), attribute).__doc__, name


def test_actions_are_pinned_and_every_minor_version_is_checked() -> None:
    tree = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    uses = [step["uses"] for job in tree["jobs"].values() for step in job["steps"] if "uses" in step]
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", use) for use in uses)
    assert tree["permissions"] == {"contents": "read"}
    assert tree["jobs"]["newest"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
