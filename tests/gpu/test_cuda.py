"""What only a GPU can show: kernels against float32 on the CPU, compiled steps, NCCL. `benchmarks/gpu.sh` runs it.

The tests hide GPUs (tests/conftest.py): CUDA_VISIBLE_DEVICES=0,1 python -m pytest -s tests/gpu/test_cuda.py
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from golden_data import GOLDEN, cases, checkpoint, collator, embedder, item
from processes import ROOT, run_python
from tiny import gradients, in_one_graph, relative

from b3 import Embedder
from b3.model.adapter import AdapterSpec, attach_adapter, load_trainable, under_autocast
from b3.model.compiled import compile_layers
from b3.train.losses.info_nce import InfoNCE
from b3.train.step import CachedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
PLAIN = InfoNCE(mask_duplicates=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("golden"))


def on_cpu(folder: Path, kind: str, dropout: float = 0.0) -> Embedder:
    return embedder(folder, kind, dropout).to("cpu")


def half(folder: Path, attention: str, kind: str = "dora", dropout: float = 0.0) -> Embedder:
    """The golden model as a GPU trains it: frozen weights in bfloat16."""
    model = Embedder.from_pretrained(folder, dtype="bfloat16", device=CUDA, attention=attention)
    model.backbone = attach_adapter(model.backbone, AdapterSpec(use_dora=kind == "dora", dropout=dropout))
    load_trainable(model.backbone, GOLDEN / f"adapter-{kind}")
    return model.train()


def flat(model: Embedder) -> torch.Tensor:
    return torch.cat([g.flatten().float().cpu() for g in gradients(model).values()])


def test_float32_is_the_cpu_s(folder: Path) -> None:
    shown = [item(case) for case in cases()]
    exact = Embedder.from_pretrained(folder, dtype="float32", device="cpu").encode(shown)
    here = Embedder.from_pretrained(folder, dtype="float32", device=CUDA).encode(shown)
    print(f"\nfloat32 vectors: largest difference to the CPU {abs(here - exact).max():.1e}")
    assert abs(here - exact).max() < 1e-5
    inputs = None
    flats = []
    for model in (on_cpu(folder, "dora"), embedder(folder, "dora").to(CUDA)):
        inputs = inputs or collator(model, 64, 2)([(0, i) for i in range(8)])
        CachedStep(model, PLAIN)(inputs, 0)
        flats.append(flat(model))
    print(f"float32 gradient: relative difference to the CPU {relative(flats[1], flats[0]):.1e}")
    assert relative(flats[1], flats[0]) < 1e-4


def test_kernels_are_as_near_to_float32_as_each_other(folder: Path) -> None:
    shown = [item(case) for case in cases()]
    exact = Embedder.from_pretrained(folder, dtype="float32", device="cpu").encode(shown)
    errors = {}
    for attention in ("sdpa", "varlen"):
        model = Embedder.from_pretrained(folder, dtype="bfloat16", device=CUDA, attention=attention)
        vectors = model.encode(shown)
        errors[attention] = float(abs(vectors - exact).max()), float((vectors * exact).sum(axis=1).min())
        alone = model.encode(shown[:1])
        assert abs(alone - vectors[:1]).max() < 0.02, attention
    for attention, (largest, cosine) in errors.items():
        print(f"\nbfloat16, {attention}: largest difference {largest:.1e}, least cosine {cosine:.5f}", end="")
    assert errors["varlen"][0] < 1.5 * errors["sdpa"][0] + 1e-3


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_gradients_in_bfloat16(folder: Path, kind: str) -> None:
    """By every kernel, compiled or not, one pass or two: equally far from float32, and the host never waits."""
    reference = on_cpu(folder, kind)
    inputs = collator(reference, 64, 2)([(0, i) for i in range(8)])
    CachedStep(reference, PLAIN)(inputs, 0)
    exact, errors = flat(reference), {}
    for attention in ("sdpa", "varlen"):
        for compiled in (False, True):
            model = half(folder, attention, kind)
            how = compile_layers(model.compiled_layers(), compiled, CUDA)
            assert how.startswith("compiled") == compiled
            step = CachedStep(model, PLAIN, autocast=True)
            step(inputs, 0)
            errors[attention, compiled] = relative(flat(model), exact)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                step(inputs, 0)
                torch.cuda.set_sync_debug_mode("default")
            waits = [str(w.message) for w in caught if "synchron" in str(w.message)]
            print(f"\n{kind} {attention} compiled={compiled}: gradient {errors[attention, compiled]:.3f} from float32,"
                  f" {len(waits)} waits", end="")  # fmt: skip
            model.zero_grad()
            assert len(waits) <= 10
    assert max(errors.values()) < 2 * errors["sdpa", False] + 0.01, errors


@pytest.mark.parametrize("compiled", [False, True])
def test_both_passes_drop_the_same(folder: Path, compiled: bool) -> None:
    """The cached gradient is that of one graph over all chunks, with the same seeds."""
    model = half(folder, "auto", dropout=0.3)
    compile_layers(model.compiled_layers(), compiled, CUDA)
    inputs = collator(model, 64, 2)([(0, i) for i in range(8)])
    step = CachedStep(model, PLAIN, autocast=True)
    result = step(inputs, 0)
    cached = flat(model)
    with under_autocast(model.backbone):
        loss = in_one_graph(step, inputs)
    plain = flat(model)
    print(f"\ncompiled={compiled}: loss {result.loss:.4f} {loss:.4f}, gradients {relative(cached, plain):.1e} apart")
    assert abs(result.loss - loss) < 0.02 * abs(loss)
    assert relative(cached, plain) < 0.05


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    changes = {"mining": {"teacher": str(folder / "model")}, "model": {"dtype": "bfloat16"}, "train": {"bf16": True}}
    tiny.write_recipe(folder, batch={"policy": "b3"}, **changes)
    return folder


def test_the_programs_run(root: Path) -> None:
    """Mining, training under torchrun (NCCL), a resumed run, evaluation."""
    mined = run_python("scripts/mine.py", root / "recipe.yaml")
    assert "mined" in mined.stdout
    count = max(1, min(2, torch.cuda.device_count()))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "train.py"]
    for steps, compiled in ((3, False), (6, True)):
        changes = [f"train.steps={steps}", f"model.compile={str(compiled).lower()}"]
        done = subprocess.run(
            [sys.executable, *launch, str(root / "recipe.yaml"), *changes],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        said = json.loads((root / "run" / "environment.json").read_text())
        print("\n", {key: said[key] for key in ("attention", "layers")})
        assert said["attention"].startswith("varlen")
        assert said["layers"].startswith("compiled") == compiled
    data = ["--dataset_name", root / "data", "--image_dir", root / "data" / "images.parquet"]
    scored = run_python(
        "eval_mmeb.py", "--model_name", root / "run", *data, "--subset_name", "words", "pictures",
        "--encode_output_path", root / "scores",
    )  # fmt: skip
    assert "words" in scored.stdout
    print(scored.stdout[-300:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("name", "code"), [("kill", -signal.SIGKILL), ("out_of_memory", 2)])
def test_one_rank_of_nccl_fails_and_both_end(root: Path, tmp_path: Path, name: str, code: int) -> None:
    import faults
    from forks import Job

    arguments = [str(root / "recipe.yaml"), f"output_dir={tmp_path / 'run'}"]
    job = Job(tmp_path, *arguments, ranks=2, program="train", prepare=faults.Fault(getattr(faults, name)))
    codes = job.wait(300.0)
    assert codes == [2, code], [job.text(rank) for rank in range(2)]
    assert "rank 1 has ended" in job.text(0)
