"""What is said about cost, against counting: tokens of real batches, operations as torch counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from b3.config import Config, load_config
from b3.data.datasets import load_datasets
from b3.train.announce import estimate, memory_note
from b3.train.build import build_trainer
from b3.train.metrics import peak_flops, step_flops
from b3.train.sampler import build_sampler
from b3.train.stop import StopRequest
from b3.train.vision_cache import VisionCache


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tiny.write_recipe(folder)
    return folder


def build(root: Path, *overrides: str) -> tuple[Config, object]:
    config = load_config(root / "recipe.yaml", [f"output_dir={root / 'run'}", *overrides])
    datasets = load_datasets(config)
    sampler = build_sampler(config, datasets, [])
    return config, build_trainer(config, datasets, [], sampler, StopRequest())


def step_inputs(trainer: object, step: int) -> object:
    places = [tuple(place) for place in trainer.sampler.batch(step).tolist()]
    return trainer.collator(places)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["equal items once", "every item"])
def test_the_estimate_of_tokens_and_chunks_is_that_of_real_batches(root: Path, dropout: float) -> None:
    """Where equal items are encoded once, fewer tokens than estimated are met, never more."""
    config, trainer = build(root, f"adapter.dropout={dropout}", "batch.size=24")
    told = estimate(config, load_datasets(config), trainer.sampler, trainer.embedder)
    steps = [step_inputs(trainer, step) for step in range(trainer.sampler.batches_per_epoch)]
    mean = sum(s.num_tokens for s in steps) / len(steps)
    chunks = sum(s.num_chunks for s in steps) / len(steps)
    if dropout:
        assert told.tokens == pytest.approx(mean, rel=0.05)
        assert told.chunks == pytest.approx(chunks, abs=1.5)
    else:
        assert 0.5 * told.tokens < mean < 1.05 * told.tokens
    assert told.weights == sum(p.numel() * p.element_size() for p in trainer.embedder.parameters())
    assert told.longest >= max(max(s.lengths) for s in steps) - 2


TARGETS = {
    "language adapter": "[q_proj, k_proj, v_proj, o_proj, down_proj]",
    "vision adapter too": r"'.*\.(q_proj|down_proj|attn\.qkv|fc1|fc2)'",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_operations_of_a_step_are_those_that_torch_counts(root: Path, targets: str) -> None:
    """Counted on forward and backward of every chunk once, a frozen tower on each image once; deep enough that the
    first layer, whose input needs no gradient, does not show."""
    from b3.model.backbones.tiny import make_tiny_model

    deep = make_tiny_model(root / "deep", ["a b c"], hidden=64, layers=12, vision_layers=8, vocab_size=400)
    _, trainer = build(root, f"model.name={deep}", f"adapter.target_modules={targets}", "train.chunk_tokens=256")
    assert any(step_inputs(trainer, step).images is not None for step in range(5, 8))
    ours = counted = 0.0
    cost = trainer.embedder.cost()
    for step in range(5, 8):
        inputs = step_inputs(trainer, step)
        ours += step_flops(cost, inputs)
        cache = VisionCache(trainer.embedder, inputs.images, 2**30)
        for chunk in map(inputs.chunk, range(inputs.num_chunks)):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # attention as products
                trainer.embedder(chunk.batch, features=cache.features(chunk)).sum().backward()
            counted += counter.get_total_flops()
    assert ours == pytest.approx(counted, rel=0.08)


def test_peaks_are_found_by_the_name_of_the_device() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("Some Card") is None


def test_memory_of_a_rank_is_the_sum_of_its_parts(root: Path) -> None:
    """Activations are held to the shapes of a GPU in tests/gpu/test_memory.py."""
    config, trainer = build(root, "train.chunk_tokens=64")
    told = estimate(config, load_datasets(config), trainer.sampler, trainer.embedder)
    trained = sum(p.numel() for p in trainer.embedder.parameters() if p.requires_grad)
    assert told.states == 3 * 4 * trained
    assert told.features == told.tokens * trainer.embedder.dim * 4  # one rank, all tokens of images
    assert told.memory == told.weights + told.states + told.activations + told.features
    whole, other = build(root, "train.chunk_tokens=100000")
    assert estimate(whole, load_datasets(whole), other.sampler, other.embedder).features == 0  # one pass keeps none


def test_a_gpu_that_may_be_too_small_is_named_with_the_remedy(root: Path) -> None:
    config, trainer = build(root)
    told = estimate(config, load_datasets(config), trainer.sampler, trainer.embedder)
    needed = told.memory - told.weights
    assert memory_note(told, told.weights, 2 * needed) is None
    note = memory_note(told, told.weights, needed)
    assert note is not None and "lower train.chunk_tokens" in note and "gradient_checkpointing" in note
