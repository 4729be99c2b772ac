"""What is trained here in sentence-transformers, without our code where that can be; our batches in its trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from forks import Job
from integrations.close import TOLERANCE, distance
from PIL import Image

from b3 import Embedder, registry
from b3.errors import InputError
from b3.train.sampler import BatchPlanSampler as PlanSampler

library = pytest.importorskip("sentence_transformers", reason="pip install 'b3[st]' runs this test")

from integrations import train_with_plan  # noqa: E402
from integrations.train_with_plan import plan  # noqa: E402

from b3.integrations.sentence_transformers import BatchPlanSampler, EmbedderModule, load  # noqa: E402

TEXTS = [" ".join(["a red disc number"] * (1 + i % 9)) + f" {i}" for i in range(30)]


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("settings", [{}, {"pooling": "cls", "max_length": 20}, {"dim": 24}])
def test_a_text_encoder_loads_without_our_code(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model = Embedder.from_pretrained(tiny.write_text_model(tmp_path / "base", kind), dtype="float32", **settings)
    model.save(tmp_path / "saved")
    assert not any("b3." in file.read_text() for file in (tmp_path / "saved").glob("*modules.json"))
    theirs = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert theirs.get_embedding_dimension() == model.dim
    assert distance(theirs.encode(TEXTS), model.encode(TEXTS)) < TOLERANCE
    again = Embedder.from_pretrained(tmp_path / "saved", dtype="float32")
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_a_run_of_a_text_encoder_loads_with_its_adapter(tmp_path: Path) -> None:
    from b3.model.adapter import AdapterSpec, attach_adapter

    model = Embedder.from_pretrained(tiny.write_text_model(tmp_path / "base"), dtype="float32")
    plain = model.encode(TEXTS)
    spec = AdapterSpec(r=4, dropout=0.0, use_dora=True, target_modules=model.adapter_targets)
    model.backbone = attach_adapter(model.backbone, spec)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    model.save(tmp_path / "run")
    theirs = library.SentenceTransformer(str(tmp_path / "run"), device="cpu", trust_remote_code=True).encode(TEXTS)
    assert distance(theirs, model.encode(TEXTS)) < TOLERANCE < np.abs(theirs - plain).max()


VLMS = [name for name in registry.BACKBONES if name not in ("bert", "roberta", "xlm-roberta", "b3_heads")]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(64, 40), (90, 90), (40, 120)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def both_inputs() -> tuple[list[Any], list[Any]]:
    """(what a user gives sentence-transformers, what it means here)."""
    theirs: list[Any] = [*TEXTS[:5]]
    ours: list[Any] = [*TEXTS[:5]]
    for image in pictures():
        theirs += [image, {"image": image, "text": "a red disc"}]
        ours += [{"image": image, "text": "<|image_1|>\n"}, {"image": image, "text": "<|image_1|>\na red disc"}]
    return theirs, ours


@pytest.mark.parametrize("kind", VLMS)
def test_a_vision_language_model_loads_with_the_installed_module(tmp_path: Path, kind: str) -> None:
    folder = registry.load("backbone", kind).tiny(tmp_path / "base", TEXTS, 0)
    given, meant = both_inputs()
    choices = ["1d"] if kind == "internvl" else ["1d", "mrope"]
    for positions in choices:
        model = Embedder.from_pretrained(folder, dtype="float32", positions=positions)
        model.save(tmp_path / positions)
        theirs = library.SentenceTransformer(str(tmp_path / positions), device="cpu", trust_remote_code=True)
        ours = model.encode(meant)
        for size in (1, 4):
            assert distance(theirs.encode(given, batch_size=size), ours) < TOLERANCE
    assert distance(load(tmp_path / "1d", device="cpu").encode(given, batch_size=3), model.encode(meant)) < (
        TOLERANCE if len(choices) == 1 else 9
    )
    assert not list((tmp_path / "1d").rglob("*.py")), "a checkpoint holds no code"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("qwen") / "base")
    Embedder.from_pretrained(folder, dtype="float32").save(folder.parent / "saved")
    return folder.parent / "saved"


def test_their_library_asks_for_consent_and_the_way_without_is_ours(qwen: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        library.SentenceTransformer(str(qwen), device="cpu")
    model = Embedder.from_pretrained(qwen, dtype="float32")
    assert distance(load(qwen, device="cpu").encode(TEXTS), model.encode(TEXTS)) < TOLERANCE


def test_what_they_save_loads_here(qwen: Path, tmp_path: Path) -> None:
    load(qwen, device="cpu").save(str(tmp_path / "again"))
    ours = Embedder.from_pretrained(qwen, dtype="float32").encode(TEXTS)
    assert np.array_equal(Embedder.from_pretrained(tmp_path / "again", dtype="float32").encode(TEXTS), ours)
    theirs = library.SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    assert distance(theirs.encode(TEXTS), ours) < TOLERANCE


def test_a_prompt_goes_where_the_rule_has_a_place(qwen: Path) -> None:
    image = pictures()[0]
    theirs = load(qwen, device="cpu").encode(["a cat", {"image": image, "text": "a cat"}], prompt="red: ")
    meant = ["red: a cat", {"image": image, "text": "<|image_1|>\nred: a cat"}]
    assert distance(theirs, Embedder.from_pretrained(qwen, dtype="float32").encode(meant)) < TOLERANCE
    theirs = load(qwen, device="cpu", prompt="vlm2vec").encode([{"image": image, "text": "a cat"}], prompt="find it")
    meant = [{"image": image, "text": "a cat", "instruction": "find it"}]
    assert distance(theirs, Embedder.from_pretrained(qwen, dtype="float32", prompt="vlm2vec").encode(meant)) < TOLERANCE


def test_their_cached_loss_gives_the_gradients_of_the_whole_batch(qwen: Path) -> None:
    """Cut batches, with images here and there."""
    from sentence_transformers.sentence_transformer import losses

    given, _ = both_inputs()
    found = []
    for kind, options in (
        (losses.MultipleNegativesRankingLoss, {}),
        (losses.CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}),
    ):
        model = load(qwen, device="cpu").eval()
        columns = [model.preprocess(given), model.preprocess(TEXTS[: len(given)])]
        loss = kind(model, **options)(columns, None)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    whole, cached = found
    assert whole.keys() == cached.keys() and any("visual" in name for name in whole)
    norm = torch.sqrt(sum((g**2).sum() for g in whole.values()))
    assert all((whole[name] - cached[name]).norm() < 1e-4 * norm for name in whole)


# Plans and trainers


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_sees_the_batches_of_the_plan(tmp_path: Path, ranks: int) -> None:
    """Under a cached loss, batch by batch, over two epochs, by the texts that reach the model."""
    rows, per_rank, size = 45, 8, 4
    if ranks == 1:
        train_with_plan.main(tmp_path, rows, per_rank, size)
    else:
        arguments = [str(tmp_path), *map(str, (rows, per_rank, size))]
        job = Job(tmp_path / "logs", *arguments, ranks=ranks, program="integrations.train_with_plan:on_a_rank")
        assert job.wait(300) == [0] * ranks, job.text()
    expected = PlanSampler(plan(rows, size), per_rank * ranks, seed=7)
    for rank in range(ranks):
        seen = [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").read_text().splitlines()]
        wanted = [
            expected.batch(step)[rank * per_rank : (rank + 1) * per_rank, 1].tolist()
            for step in range(2 * expected.batches_per_epoch)
        ]
        assert seen == wanted
    first, second = (expected.batch(s)[:, 1].tolist() for s in (0, expected.batches_per_epoch))
    assert first != second, "each epoch draws anew"


def test_several_plans_are_for_rows_end_to_end() -> None:
    plans = [plan(20, 4), plan(13, 4, seed=1)]
    sampler = BatchPlanSampler.of(plans, world_size=1)(range(33), 8, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) > 0
    for batch in batches:
        assert max(batch) < 20 or min(batch) >= 20, "a batch is of one data set"
    whole = PlanSampler(plans, 8, seed=3)
    assert batches == [[row + 20 * number for number, row in pairs] for pairs in whole]


def test_rows_that_are_not_the_plans_are_refused_or_taken_in_order() -> None:
    with pytest.raises(InputError, match="the data set has 19 rows, the plan 20"):
        BatchPlanSampler.of(plan(20, 4), world_size=1)(range(19), 8)
    sampler = BatchPlanSampler.of(plan(20, 4), world_size=1, others="in_order")(range(10), 4)
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and len(sampler) == 3
    with pytest.raises(InputError, match="not a multiple of the community size 4"):
        BatchPlanSampler.of(plan(20, 4), world_size=1)(range(20), 6)


def test_a_module_says_what_it_reads(qwen: Path, tmp_path: Path) -> None:
    assert ("image", "text") in load(qwen, device="cpu").modalities
    text = tiny.write_text_model(tmp_path / "text")
    assert EmbedderModule(Embedder.from_pretrained(text, dtype="float32")).modalities == ["text"]
