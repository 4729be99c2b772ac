"""The same short runs under two interpreters with other versions of the dependencies, and how far their numbers differ.

    python tests/hardening/versions.py LOWEST/bin/python NEWEST/bin/python [--root DIR]

The first interpreter writes the data. Then each of both, in the same folder: pixels, token ids and vectors of the
golden images and texts; the `PROGRAMS` (mining, training of an adapter and of all weights, encoding, evaluation,
export). A table says for each kind of number how many there are, how many differ, and the largest difference. Exit
code 1 if one is larger than `MOST`. Environments are made outside the repository:

    uv venv lowest && uv pip compile --resolution lowest-direct --override torch.txt pyproject.toml -o lowest.txt
    VIRTUAL_ENV=lowest uv pip install -r lowest.txt            torch.txt: the one torch that both share, torch==2.13.0

Not part of `make test`; `make harden` does not run it either, as it needs two environments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What depends on the moment, or says which version wrote it, by the name of its JSON key.
TIMES = (
    "seconds peak_memory_bytes items_per_second pairs_per_second tokens_per_second waiting_for_data date versions"
    " tflops_per_rank mfu report_generated_date transformers_version peft_version files"
).split()
OF_LIBRARIES = ("adapter_config.json", "config.json", "generation_config.json")  # newer ones write more keys
PROGRAMS = "mining mining-arrays training training-full encoding evaluation-v1 evaluation-v2 export".split()
PACKAGES = (
    "torch transformers peft accelerate datasets tokenizers safetensors huggingface-hub numpy scipy numba pyarrow"
    " pillow pydantic pyyaml tqdm matplotlib"
).split()
MOST = {  # largest difference that is allowed, by kind; 0: equal
    "pixels": 0, "token ids": 0, "vectors": 1e-6, "plans": 0, "reports": 1e-6, "losses and metrics": 1e-6,
    "weights": 1e-6, "scores": 0, "exported weights": 1e-6, "texts": 0,
}  # fmt: skip


def measure(root: Path, out: Path) -> None:
    """Pixels, token ids and vectors of the golden cases under this interpreter, and its versions."""
    from importlib.metadata import version

    import numpy as np
    import paths  # noqa: F401
    from golden_data import cases, item

    from b3 import Embedder

    arrays: dict[str, Any] = {}
    for name, dtype in (("v2-model", "float32"), ("v2-model", "bfloat16"), ("text-model", "float32")):
        model = Embedder.from_pretrained(root / name, dtype=dtype, device="cpu")
        items = {case["id"]: item(case) for case in cases() if name == "v2-model" or not case["image"]}
        if name == "v2-model" and dtype == "float32":
            for key, one in items.items():
                read = model.processor(one)
                arrays[f"token ids/{key}"] = read.input_ids
                for number, visual in enumerate(read.visuals):
                    arrays[f"pixels/{key}-{number}"] = visual.patches
        arrays[f"vectors/{name}-{dtype}"] = model.encode(list(items.values()))
    for name, array in arrays.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(out / f"{name}.npy", array)
    (out / "versions.json").write_text(json.dumps({name: version(name) for name in PACKAGES}))


def prepare(root: Path) -> None:
    import paths
    import tiny

    paths.prepare(root)
    tiny.write_text_model(root / "text-model")


def run(python: str, root: Path, keep: Path) -> None:
    """All of it under one interpreter, in root/work, which becomes `keep`."""
    import paths

    work = root / "work"
    work.mkdir()
    call(python, __file__, "--measure", str(root), str(work / "golden"))
    for name in PROGRAMS:
        one = paths.RUNS[name]
        place = work / name
        place.mkdir()
        call(python, "-m", one.program, *one.command(root, place))
    work.rename(keep)


def call(python: str, *arguments: str) -> None:
    place = Path(__file__).parents[2]
    compiled = {"NUMBA_CACHE_DIR": f"{tempfile.gettempdir()}/b3-compiled-{zlib.crc32(python.encode())}"}  # one for each
    done = subprocess.run([python, *arguments], cwd=place, capture_output=True, text=True, env=os.environ | compiled)
    if done.returncode:
        raise SystemExit(f"{python} {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def values(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, an array, a number or a text) of all that was left."""
    import numpy as np
    from safetensors.torch import load_file

    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".npy":
            yield kind_of(name), name, np.load(file)
        elif file.suffix == ".safetensors":
            for key, tensor in load_file(file).items():
                yield kind_of(name), f"{name}/{key}", (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        elif file.suffix == ".txt":
            yield "texts", name, file.read_text().splitlines()
        elif file.suffix in (".json", ".jsonl") and file.name not in ("environment.json", "versions.json"):
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            for number, line in enumerate(lines):
                for key, value in flat(json.loads(line)):
                    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                    yield kind_of(name) if is_number else "texts", f"{name}:{number}/{key}", value


def kind_of(name: str) -> str:
    """The line of the table for a file."""
    program, rest = name.split("/", 1)
    if program == "golden":
        return rest.split("/")[0]
    if program == "encoding":
        return "vectors"
    if program == "export":
        return "exported weights"
    if program.startswith("evaluation"):
        return "scores"
    if program.startswith("mining"):
        return "plans" if name.endswith(".npy") else "reports"
    return "weights" if ".safetensors" in name else "losses and metrics"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in TIMES:
                yield from flat(part, f"{key}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from flat(part, f"{key}[{number}]")
    else:
        yield key, value


@dataclass
class Line:
    """Of the table: how many numbers, how many differ, the largest difference and where it is."""

    count: int = 0
    differing: int = 0
    largest: float = 0.0
    where: str = ""

    def add(self, name: str, one: Any, other: Any) -> None:
        import numpy as np

        a, b = np.atleast_1d(one), np.atleast_1d(other)
        self.count += max(a.size, b.size)
        if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
            apart, size = max(a.size, b.size), float("inf")
        elif a.dtype.kind in "fiub":
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
            gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
            gap[np.isnan(gap)] = np.inf
            apart, size = int((gap > 0).sum()), float(gap.max(initial=0))
        else:
            apart = int((a != b).sum())
            size = float("inf") if apart else 0.0
        self.differing += apart
        if size > self.largest:
            self.largest, self.where = size, name


def compare(one: Path, other: Path) -> dict[str, Line]:
    lines: dict[str, Line] = {kind: Line() for kind in MOST}
    first = {name: (kind, value) for kind, name, value in values(one)}
    second = {name: (kind, value) for kind, name, value in values(other)}
    for name in sorted(first.keys() | second.keys()):
        kind, value = first.get(name) or second[name]
        known = name in first and name in second
        if not known and name.split(":")[0].endswith(OF_LIBRARIES):
            continue
        lines[kind].add(name, value, second[name][1] if known else None)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreters", nargs=2, metavar="PYTHON")
    parser.add_argument("--root", type=Path, help="folder to work in and to keep; not there yet")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*map(Path, arguments.interpreters))
        return 0
    if arguments.prepare:
        prepare(Path(arguments.interpreters[0]))
        return 0
    root = (arguments.root or Path(tempfile.mkdtemp(prefix="b3-versions-"))).resolve()
    root.mkdir(exist_ok=True)
    call(arguments.interpreters[0], __file__, "--prepare", str(root), "-")
    kept = [root / name for name in ("first", "second")]
    for python, keep in zip(arguments.interpreters, kept, strict=True):
        run(python, root, keep)
    versions = [json.loads((keep / "golden" / "versions.json").read_text()) for keep in kept]
    print("\n".join(f"{name:16} {versions[0][name]:12} {versions[1][name]}" for name in PACKAGES))
    lines, code = compare(*kept), 0
    print("\n| numbers | how many | differ | largest difference | where |\n|---|---:|---:|---:|---|")
    for kind, line in lines.items():
        print(f"| {kind} | {line.count:,} | {line.differing:,} | {line.largest:.1e} | {line.where} |")
        code |= line.largest > MOST[kind]
    if arguments.root is None:
        shutil.rmtree(root)
    return int(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import paths  # noqa: F401  the paths of tests, one thread, no network

    sys.exit(main())
