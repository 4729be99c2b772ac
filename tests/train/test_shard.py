"""Frozen weights over the ranks give the run that whole weights give; what cannot be sharded is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from forks import Job
from safetensors.torch import load_file

ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


def run(
    root: Path, name: str, *overrides: str, ranks: int = 2, code: int = 0, variables: dict[str, str] | None = None
) -> Job:
    arguments = [str(root / "recipe.yaml"), f"output_dir={root / name}", *overrides]
    job = Job(root / "logs" / name, *arguments, ranks=ranks, variables=variables)
    assert job.wait() == [code] * ranks, job.text()
    return job


UNEQUAL = ("model.gradient_checkpointing=true", "batch.policy=random_mixed", "train.chunk_tokens=40")


@pytest.mark.parametrize(
    "overrides",
    [("adapter.use_dora=true", "adapter.dropout=0.2"), UNEQUAL],
    ids=["dora, dropout", "gradient checkpointing, unequal chunks"],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sharded_run_equals_a_whole_one(root: Path, overrides: tuple[str, ...], ranks: int) -> None:
    name = f"{ranks}-{len(overrides[0])}"
    run(root, f"whole-{name}", *overrides, ranks=ranks)
    run(root, f"sharded-{name}", *overrides, "model.shard=true", ranks=ranks)
    one, other = (
        [json.loads(line)["loss"] for line in (root / f"{kind}-{name}" / "metrics.jsonl").read_text().splitlines()]
        for kind in ("whole", "sharded")
    )
    # Sharded ranks cut equally many chunks: float32 sums in another order, 1e-7 in step 1, which training multiplies.
    assert other[0] == pytest.approx(one[0], rel=5e-7)
    assert other == pytest.approx(one, rel=1e-5)
    mine, theirs = (load_file(root / f"{kind}-{name}" / "adapter_model.safetensors") for kind in ("sharded", "whole"))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)


def test_a_sharded_run_continues_from_a_checkpoint(root: Path) -> None:
    run(root, "parts", "model.shard=true", "train.schedule=constant", "train.steps=3")
    run(root, "parts", "model.shard=true", "train.schedule=constant", "train.steps=6")
    run(root, "at-once", "model.shard=true", "train.schedule=constant", "train.steps=6")
    mine, theirs = (load_file(root / name / "adapter_model.safetensors") for name in ("parts", "at-once"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_sharding_on_one_rank_changes_nothing_and_is_said(root: Path) -> None:
    job = run(root, "alone", "model.shard=true", "train.steps=1", ranks=1)
    assert "note: model.shard spreads nothing over a single rank" in job.text()


def test_deepspeed_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from b3.config import load_config
    from b3.errors import RunError
    from b3.train.run import check_machine

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match=r"DeepSpeed is not supported: .* torchrun"):
        check_machine(load_config(root / "recipe.yaml"))


def test_the_fsdp_of_accelerate_becomes_ours(root: Path) -> None:
    """Under what `accelerate launch` sets for fsdp2.yaml; an older FSDP is refused."""
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    run(root, "torchrun", "model.shard=true")
    run(root, "accelerate", variables=variables)
    mine, theirs = (load_file(root / name / "adapter_model.safetensors") for name in ("accelerate", "torchrun"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    job = run(root, "old", variables={**variables, "FSDP_VERSION": "1"}, code=2)
    assert "accelerate asks for FSDP 1, which is not supported" in job.text()


def test_weights_really_are_spread_and_chunks_really_unequal(root: Path, tmp_path: Path) -> None:
    """What the equality tests rest on: a rank says that it holds less, and ranks have different numbers of chunks."""
    from b3.config import load_config
    from b3.data.datasets import load_datasets
    from b3.train.build import build_trainer
    from b3.train.sampler import build_sampler
    from b3.train.stop import StopRequest

    held = []
    for kind in ("whole", "sharded"):
        job = run(root, f"held-{kind}", f"model.shard={kind == 'sharded'}", "train.steps=1")
        line = next(line for line in job.text().splitlines() if "memory of a rank" in line)
        held.append(float(line.partition("weights ")[2].split()[0]))
    config = load_config(root / "recipe.yaml", [*UNEQUAL, f"output_dir={tmp_path}"])
    datasets = load_datasets(config)
    trainer = build_trainer(config, datasets, [], build_sampler(config, datasets, []), StopRequest())
    frozen = [p for layer in trainer.embedder.layers() for p in layer.parameters() if not p.requires_grad]
    half = sum(p.numel() * p.element_size() for p in frozen) / 2 / 1024  # KiB: each of two ranks lets go of one half
    assert held[0] - held[1] == pytest.approx(half, rel=0.01)
    counts = set()
    for step in range(6):
        places = [tuple(place) for place in trainer.sampler.batch(step).tolist()]
        halves = [trainer.collator(places[side]).num_chunks for side in (slice(6), slice(6, 12))]
        counts.add(halves[0] - halves[1])
    assert counts != {0}


def plugin_of(file: Path) -> object:
    """The plugin that accelerate builds from a configuration file."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    settings = yaml.safe_load(file.read_text())["fsdp_config"]
    return FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=[settings["fsdp_transformer_layer_cls_to_wrap"]],
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
        state_dict_type=settings["fsdp_state_dict_type"],
        cpu_ram_efficient_loading=settings["fsdp_cpu_ram_efficient_loading"],
    )


@pytest.mark.parametrize("file", sorted(ACCELERATE.glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_reads_its_configuration(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(file))
    assert settings.mixed_precision == "no" and settings.num_processes == 8
    assert settings.distributed_type in ("MULTI_GPU", "FSDP"), "what is shipped is not refused"
    if file.stem.startswith("fsdp"):
        plugin = plugin_of(file)
        assert plugin.fsdp_version == 2 and plugin.transformer_cls_names_to_wrap == ["Qwen2VLDecoderLayer"]  # type: ignore[attr-defined]
