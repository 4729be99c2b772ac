"""A training step at its real size on a machine without a GPU: memory, operations and launches, from shapes alone.

`FakeTensorMode` follows shapes and storage through forward and backward as on a GPU, autocast and dropout masks
included; nothing is computed. A CPU build of torch takes tensors of a CUDA device only with a device guard, which
`guard.cpp` gives and which must be loaded before torch: hence a process of its own, and a C++ compiler. Of a model's
equal layers a few are run: bytes and operations are linear in their number (tests/gpu/test_memory.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

FOLDER = Path(__file__).parent
CHECKPOINTS = {
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl_2b.json",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl_7b.json",
    "Qwen/Qwen3.5-9B": "qwen3_5_9b.json",  # upstream's default configuration
    # as their config.json is quoted in public; of Qwen3-VL's mergers for single layers one runs
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl_2b.json",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl_8b.json",
    "OpenGVLab/InternVL3-2B-hf": "internvl3_2b.json",
    "OpenGVLab/InternVL3-8B-hf": "internvl3_8b.json",
    "FacebookAI/roberta-large": "roberta_large.json",
}


def why_not() -> str | None:
    """What this machine lacks for it, or None."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    if "cuda: Optional[str] = None" not in (Path(spec.origin).parent / "version.py").read_text():
        return "torch was built for a GPU, which brings a device guard of its own; needs a CPU build"
    return None if compiler() else "needs a C++ compiler"


def compiler() -> str | None:
    return which("c++") or which("g++") or which("clang++")


def library() -> Path:
    """The compiled guard, made once per machine, torch and source."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    libraries = torch_folder / "lib"
    command = [str(compiler()), "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}"]
    command += [str(FOLDER / "guard.cpp"), f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    command += [f"-Wl,-rpath,{libraries}"]
    parts = [
        (FOLDER / "guard.cpp").read_bytes(),
        (torch_folder / "version.py").read_bytes(),
        " ".join(command).encode(),
    ]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"b3-claimed-cuda-{os.getuid()}-{key}.so"
    if not target.exists():
        staged = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(staged)], check=True)
        staged.replace(target)
    return target


def measure(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`benchmarks.shapes.claimed.run` of each case, in one process."""
    library()
    root = FOLDER.parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "benchmarks.shapes", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def at_size(layers: int, vision_layers: int, **case: Any) -> list[dict[str, Any]]:
    """Cases from which `whole` makes the numbers of a model with so many layers; equal to one where there are none."""
    few = [{"layers": 2, "vision_layers": 1}, {"layers": 3, "vision_layers": 1}]
    return [{**case, **counts} for counts in few + [{"layers": 2, "vision_layers": 2}][: bool(vision_layers)]]


def whole(results: list[dict[str, Any]], layers: int, vision_layers: int) -> dict[str, Any]:
    """The numbers of `at_size`'s cases, continued to all layers."""
    base, deeper, *seeing = results

    def line(at: Any, more: Any, sight: Any) -> Any:
        if isinstance(at, dict):
            return {key: line(at[key], more[key], sight[key]) for key in at}
        if isinstance(at, list):
            return [line(*three) for three in zip(at, more, sight, strict=True)]
        return at + (layers - 2) * (more - at) + (vision_layers - 1) * (sight - at)

    return line(base, deeper, seeing[0] if seeing else base)
