"""Distillation: what it is zero for, what it never sees, and a run with vectors that mining has kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from forks import Job
from reference_loss import as_inputs, random_batch

import train
from b3.config import load_config
from b3.errors import ConfigError
from b3.mining.recipe import mine_recipe
from b3.train.losses.distill import two_way_kl
from b3.train.losses.info_nce import InfoNCE
from b3.train.objective import whole_batch
from scripts import mine

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[2]


def test_equals_scipy_row_by_row_and_masked_columns_are_not_seen() -> None:
    special = pytest.importorskip("scipy.special")
    random = np.random.default_rng(0)
    scores, teacher = random.uniform(-1, 1, (2, 6, 9))
    excluded = random.random((6, 9)) < 0.4
    excluded[:, 0] = False
    expected = 0.0
    for row in range(6):
        t, s = (special.softmax(table[row, ~excluded[row]] / 0.05) for table in (teacher, scores))
        expected += (special.rel_entr(t, s).sum() + special.rel_entr(s, t).sum()) / 2
    student = torch.tensor(scores).requires_grad_()
    mask = torch.tensor(excluded)
    loss = two_way_kl(student, torch.tensor(teacher), 0.05, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(student.grad).all() and (student.grad[mask] == 0).all()
    shifted = torch.tensor(np.where(excluded, 0.99, scores)), torch.tensor(np.where(excluded, -0.99, teacher))
    assert two_way_kl(*shifted, 0.05, mask).item() == pytest.approx(expected, rel=1e-12)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    queries, targets, facts = random_batch(7, 2, 0)
    facts |= {"teacher_queries": queries * 3, "teacher_targets": targets * 5}  # lengths do not count
    loss = InfoNCE(distill_weight=1.0, distill_temperature=0.05, symmetric=True)
    means, *gradients = whole_batch(loss, queries, targets, as_inputs(facts))
    assert abs(means[0].item()) < 1e-12
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    tiny.write_data(folder / "data")
    tiny.write_model(folder / "model")
    tree = tiny.recipe(folder, output_dir=str(folder / "run"), train={"steps": 2})
    tree["mining"] |= {"teacher": str(folder / "model"), "dir": str(folder / "plans")}
    (folder / "plain.yaml").write_text(yaml.safe_dump(tree))
    tree["train"]["distill"] = {"weight": 0.5, "temperature": 0.05}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_mining_keeps_what_training_reads(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for plans that were mined without it, whose bytes do not depend on it; without mining, one line says so."""
    recipe, plans = str(root / "recipe.yaml"), root / "plans"
    plain = {name: plan.communities for name, plan in mine_recipe(load_config(root / "plain.yaml")).items()}
    assert not (plans / ".vectors").exists()
    assert train.main([recipe]) == 2
    assert "train.distill reads vectors of mining.teacher" in capsys.readouterr().err.splitlines()[-1]
    assert mine.main([recipe]) == 0
    fresh = mine_recipe(load_config(recipe, [f"mining.dir={root / 'other'}"]))
    for name, communities in plain.items():
        np.testing.assert_array_equal(fresh[name].communities, communities)
        for side in ("queries", "targets"):
            kept = [np.load(folder / ".vectors" / name / f"{side}.npy") for folder in (plans, root / "other")]
            np.testing.assert_array_equal(*kept)
            assert len(kept[0]) == 96
    assert train.main([recipe]) == 0
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    shorter = [f"output_dir={root / 'short'}", f"mining.dir={root / 'short-plans'}", "mining.teacher_dim=8"]
    assert mine.main([recipe, *shorter]) == 0 and train.main([recipe, *shorter]) == 0
    manifest = json.loads((plans / ".vectors" / next(iter(plain)) / "manifest.json").read_text())
    assert manifest["teacher"] == str(root / "model")


def test_vectors_of_other_data_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = str(root / "recipe.yaml"), f"mining.dir={tmp_path / 'plans'}"
    assert mine.main([recipe, folder]) == 0
    assert mine.main([recipe, folder, "data.prefix_targets=false", "mining.m=7"]) == 2
    assert "holds another" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["text_nli_roberta_b3.yaml", "b3pp_qwen2vl_2b.yaml"])
def test_the_debug_form_of_a_recipe_with_all_of_it(name: str, tmp_path: Path) -> None:
    """A tiny model is narrower than the recipe's lengths, and its teacher may be a checkpoint."""
    keys = ["train.distill.weight=0.3", "train.matryoshka=[256,512]", "model.dim=768", "mining.teacher_dim=256"]
    job = Job(tmp_path / "logs", str(ROOT / "configs" / name), f"output_dir={tmp_path / 'run'}", *keys, "--debug")
    assert job.wait() == [0], job.text()
    resolved = load_config(tmp_path / "run-debug" / "config.yaml")
    assert resolved.train.lengths == {2: 1.0, 3: 1.0} and resolved.model.dim == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.distill.weight=0"], r"train\.distill\.weight"),
        (["train.distill.weight=1.5"], r"train\.distill\.weight"),
        (["train.distill.temperature=0"], r"train\.distill\.temperature"),
        (["train.distill.tau=1"], r"train\.distill\.tau"),
        (
            ["negatives.source=data", "negatives.per_query=1"],
            r"train\.distill needs the teacher's vectors .* leave one out",
        ),
    ],
)
def test_options_that_cannot_be_meant(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(root / "recipe.yaml", overrides)
