"""Text encoders through the whole of training: exact cached gradients, runs that reload and resume, clear refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from forks import Job

from b3 import Embedder
from b3.config import Config, load_config
from b3.data.items import Item
from b3.errors import DataError, InputError, RunError
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.batch import collate
from b3.model.checkpoint import unfreeze_all
from b3.train.build import build_embedder
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE, info_nce
from b3.train.metrics import step_flops
from b3.train.run import train
from b3.train.step import CachedStep

TEXTS = ["a red square number 1", "what is a green disc?\n", "a blue bar"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny.write_data(folder / "data")
    tiny.write_text_model(folder / "model", dropout=0.1)
    tiny.write_text_model(folder / "still", dropout=0.0)
    tiny.write_text_model(folder / "deep", layers=12, dropout=0.1)
    return folder


def recipe(root: Path, full: bool, **changes: Any) -> dict[str, Any]:
    """Three steps on the texts, with dropout in the backbone."""
    base: dict[str, Any] = {
        "model": {"pooling": "cls", **({"train": "full"} if full else {})},
        "data": {"datasets": [{"subset": "words"}]},
        "train": {"steps": 3, "lr": 1e-3, "save_every": 2, "chunk_tokens": 64},
    }
    tree = tiny.recipe(root, **base)
    del tree["data"]["image_dir"]
    if full:
        del tree["adapter"]
    from b3.config.load import merge

    return merge(tree, changes)


class Pairs:
    """Queries and targets of many lengths; row 4 repeats row 0's target."""

    def __len__(self) -> int:
        return 8

    def query(self, row: int) -> Item:
        return Item("what is " + "a red disc " * (row + 1))

    def target(self, row: int) -> Item:
        return Item("a green bar " * (row % 4 + 1))


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_cached_step_has_the_plain_gradient(root: Path, kind: str, pooling: str) -> None:
    model = Embedder.from_pretrained(root / "still", dtype="float32", pooling=pooling)
    if kind == "full":
        unfreeze_all(model.backbone)
    else:
        spec = AdapterSpec(dropout=0.0, use_dora=kind == "dora", target_modules=model.adapter_targets)
        model.backbone = attach_adapter(model.backbone, spec)
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
    model.train()
    data = Pairs()
    inputs = StepCollator([data], model.processor, 50)([(0, row) for row in range(8)])  # type: ignore[list-item]
    assert inputs.num_chunks > 2 and inputs.num_items == 12
    result = CachedStep(model, InfoNCE(mask_duplicates=False))(inputs, 0)
    cached = {n: p.grad.clone() for n, p in model.backbone.named_parameters() if p.grad is not None}
    model.zero_grad()
    sides = (data.query, data.target)
    queries, targets = (torch.cat([model(collate([model.processor(side(row))])) for row in range(8)]) for side in sides)
    loss = info_nce(queries, targets, 0.02)
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    largest = max(float(p.grad.norm()) for p in model.backbone.parameters() if p.grad is not None)
    plain = {n: p.grad for n, p in model.backbone.named_parameters() if p.grad is not None}
    assert cached.keys() == plain.keys() and len(plain) > 20
    for name, value in plain.items():
        assert (cached[name] - value).norm() < 1e-4 * value.norm() + 1e-6 * largest, name


def test_an_adapter_section_is_no_error_where_all_weights_are_trained(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = recipe(root, False, output_dir=str(tmp_path / "run"), train={"steps": 1, "save_merged": True})
    tree["model"]["train"] = "full"
    tree["adapter"] = {"r": 4}
    train(Config.model_validate(tree))
    assert "all weights are trained (model.train full): the section adapter is not used" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_a_run_reloads_and_resumes(root: Path, tmp_path: Path, full: bool) -> None:
    """With dropout in the backbone: a resumed run draws the same masks and ends with the same vectors."""
    tree = recipe(root, full, output_dir=str(tmp_path / "run"))
    train(Config.model_validate(tree))
    vectors = Embedder.from_pretrained(tmp_path / "run", dtype="float32").encode(TEXTS)
    before = Embedder.from_pretrained(root / "model", dtype="float32", pooling="cls").encode(TEXTS)
    assert np.abs(vectors - before).max() > 1e-4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "the first token's final hidden state" in card and "image_1" not in card
    written = load_config(tmp_path / "run" / "config.yaml")  # gives every key
    build_embedder(written)
    for name in ("result.json", "checkpoint-3/complete.json"):
        (tmp_path / "run" / name).unlink()
    train(Config.model_validate(tree))
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert tiny.without_times(again) == tiny.without_times(lines) and len(lines) == 3
    assert np.array_equal(Embedder.from_pretrained(tmp_path / "run", dtype="float32").encode(TEXTS), vectors)


def test_merged_weights_are_the_adapters(root: Path, tmp_path: Path) -> None:
    tree = recipe(root, False, output_dir=str(tmp_path / "run"), train={"save_merged": True})
    train(Config.model_validate(tree))
    merged, apart = (
        Embedder.from_pretrained(f, dtype="float32") for f in (tmp_path / "run" / "merged", tmp_path / "run")
    )
    assert merged.settings.pooling == apart.settings.pooling == "cls"
    assert np.abs(merged.encode(TEXTS) - apart.encode(TEXTS)).max() < 1e-6


def test_mining_with_a_text_teacher_then_training_on_two_ranks(root: Path, tmp_path: Path) -> None:
    from b3.mining.recipe import mine_recipe

    tree = recipe(root, True, output_dir=str(tmp_path / "one"), batch={"policy": "b3"})
    tree["mining"] |= {"dir": str(tmp_path / "mining"), "teacher": str(root / "still")}
    tree["model"]["name"] = str(root / "still")
    tree["train"]["steps"] = 2
    mine_recipe(Config.model_validate(tree))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    losses = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks-{ranks}"
        job = Job(folder / "logs", str(tmp_path / "recipe.yaml"), f"output_dir={folder / 'run'}", ranks=ranks)
        assert job.wait() == [0] * ranks, job.text()
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2


def test_equal_texts_share_a_pass_only_without_dropout(root: Path) -> None:
    for name, drops in (("model", True), ("still", False)):
        tree = recipe(root, True)
        tree["model"]["name"] = str(root / name)
        assert build_embedder(Config.model_validate(tree)).has_dropout == drops


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "pooling", "last", "pooling 'last' is not for text encoders"),
        ("model", "shard", True, "model.shard spreads decoder layers"),
    ],
)
def test_keys_without_meaning(root: Path, section: str, key: str, value: Any, message: str) -> None:
    tree = recipe(root, False)
    tree[section][key] = value
    with pytest.raises((InputError, RunError), match=message):
        build_embedder(Config.model_validate(tree))


def test_a_row_with_an_image_ends_the_run_with_its_name(root: Path, tmp_path: Path) -> None:
    tree = recipe(root, False, output_dir=str(tmp_path / "run"))
    tree["data"] |= {"datasets": [{"subset": "pictures"}], "image_dir": str(root / "data" / "images.parquet")}
    with pytest.raises(DataError, match=r"pictures row \d+: .*\.png: the backbone is a text encoder"):
        train(Config.model_validate(tree))


def test_operations_are_those_that_torch_counts(root: Path) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tree = recipe(root, False, adapter={"target_modules": ["query", "dense"]})
    tree["model"]["name"] = str(root / "deep")
    model = build_embedder(Config.model_validate(tree))
    inputs = StepCollator([Pairs()], model.processor, 10000)([(0, row) for row in range(8)])  # type: ignore[list-item]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs.chunk(0).batch).sum().backward()
    assert step_flops(model.cost(), inputs) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_gradient_checkpointing_changes_nothing(root: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        tree = recipe(root, False)
        tree["model"]["gradient_checkpointing"] = checkpointing
        model = build_embedder(Config.model_validate(tree)).train()
        torch.manual_seed(0)
        model(collate([model.processor(Item(text)) for text in TEXTS]))[:, 0].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 24
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_the_triples_of_simcse_become_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from b3.data.datasets import load_pairs
    from scripts.prepare_nli import main

    triples = [("A man, outside.", 'He says "hi".', "Nobody is there."), ("Two dogs", "Animals", "No dogs")]
    with (tmp_path / "nli.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("sent0", "sent1", "hard_neg"), *triples])
    assert main([str(tmp_path / "nli.csv"), "--out", str(tmp_path / "out" / "nli.jsonl")]) == 0
    pairs = load_pairs(f"jsonl:{tmp_path / 'out' / 'nli.jsonl'}", "nli")
    found = [(pairs.query(i).text, pairs.target(i).text, pairs.negatives(i)[0].text) for i in range(len(pairs))]
    assert found == triples
    (tmp_path / "bad.csv").write_text("sent0,sent1,hard_neg\na,b,c\na,,c\n")
    assert main([str(tmp_path / "bad.csv"), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "bad.csv:3: a sentence is empty" in capsys.readouterr().err


def test_the_text_recipes_differ_in_their_batches_only() -> None:
    configs = Path(__file__).parents[2] / "configs"
    ours, control = (load_config(configs / f"text_nli_roberta_{name}.yaml") for name in ("b3", "random"))
    different = {k for k, v in ours.model_dump().items() if v != control.model_dump()[k]}
    assert different == {"name", "output_dir", "batch"}
    assert ours.mining.teacher == control.output_dir
