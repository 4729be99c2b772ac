"""What would change a number without a word: each is refused, or named. docs/reliability.md has the list."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from faults import other_data, other_versions
from forks import Job
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_mmeb
import train
from b3 import Embedder, distributed
from b3.config import load_config
from b3.data.datasets import load_datasets
from b3.data.images import ParquetImages
from b3.errors import DataError, InputError, RunError
from b3.files import sampled_sha256, sha256
from b3.mining.recipe import load_plan, mine_recipe
from b3.train.build import open_teachers
from b3.train.checkpoint import decisive

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    tiny.write_data(folder / "data", rows=24)
    tiny.write_model(folder / "model")
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """Data with images as files, a model, arrays of a teacher, and a recipe of two steps."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "images").mkdir()
    for row in pq.read_table(tmp_path / "data" / "images.parquet").to_pylist():
        (tmp_path / "images" / row["path"]).write_bytes(row["bytes"])
    teach(tmp_path, 0)
    tiny.write_recipe(tmp_path, data={"image_dir": str(tmp_path / "images")}, train={"steps": 2, "save_every": 1})
    return tmp_path


def teach(root: Path, seed: int, **dims: int) -> None:
    rng = np.random.default_rng(seed)
    (root / "teacher").mkdir(exist_ok=True)
    for subset in ("pictures", "words"):
        for side in ("queries", "targets"):
            array = rng.normal(size=(24, dims.get(subset, 8))).astype(np.float32)
            np.save(root / "teacher" / f"{subset}_{side}.npy", array)


def other_pixels(folder: Path) -> None:
    """Every image of a folder made anew under its name."""
    for number, file in enumerate(sorted(folder.iterdir())):
        Image.new("RGB", (60, 60), (number, 2 * number, 90)).save(file)


def other_weights(folder: Path) -> None:
    """As a checkpoint that was trained again: the same shapes, other values."""
    weights = load_file(folder / "model.safetensors")
    save_file({n: w + 0.01 for n, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_sampled_digests_see_a_change_all_over_and_of_size(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "a").write_bytes(content)
    assert sampled_sha256(tmp_path / "a") == sha256(tmp_path / "a"), "few bytes are all read"
    few: dict[str, Any] = {"blocks": 4, "size": 1000}
    digest = sampled_sha256(tmp_path / "a", **few)
    for changed in (content + b"x", content[:-1] + b"x", b"x" + content[1:], bytes(b ^ 1 for b in content)):
        (tmp_path / "b").write_bytes(changed)
        assert sampled_sha256(tmp_path / "b", **few) != digest
    assert digest == sampled_sha256(tmp_path / "a", **few)


# Evaluation


def evaluate(root: Path, *more: str) -> int:
    return eval_mmeb.main([
        "--model_name", str(root / "model"), "--dataset_name", str(root / "data"), "--normalize", "True",
        "--image_dir", str(root / "images"), "--encode_output_path", str(root / "out"), "--subset_name",
        "pictures", *more,
    ])  # fmt: skip


def reverse(file: Path, *columns: str) -> None:
    table = pq.read_table(file)
    for name in columns:
        values = pa.array(table[name].to_pylist()[::-1], type=table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, file)


def test_scores_of_rows_that_have_changed_are_not_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(root, "words") == 0 and evaluate(root, "words") == 0
    reverse(next((root / "data" / "pictures").glob("test*")), "tgt_text")
    assert evaluate(root, "words") == 2
    message = capsys.readouterr().err
    assert "holds another evaluation (pictures.rows was" in message and "its data have changed" in message
    (root / "out" / "pictures_score.json").unlink()  # what is not scored yet may change
    assert evaluate(root, "words") == 0


def test_scores_of_images_that_were_made_anew_are_not_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(root) == 0
    other_pixels(root / "images")
    assert evaluate(root) == 2
    assert "(pictures.images was" in capsys.readouterr().err


def test_vectors_of_another_device_or_kernel_are_not_met(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate(root) == 0
    folders = set((root / "out" / "embeddings").iterdir())
    (root / "out" / "pictures_score.json").unlink()
    monkeypatch.setattr(Embedder, "numerics", "torch.float32 on cuda, attention varlen")
    assert evaluate(root) == 0
    assert len(set((root / "out" / "embeddings").iterdir()) - folders) == 1


def test_settings_of_the_checkpoint_that_an_evaluation_leaves_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Embedder.from_pretrained(root / "model", dtype="float32", positions="mrope", max_pixels=6272)
    saved.save(root / "model")
    assert evaluate(root) == 0
    out = capsys.readouterr().out
    assert "note: positions is 1d here, and the checkpoint says mrope (--positions)" in out
    assert "note: max_pixels is 1003520 here, and the checkpoint says 6272 (--resize_max_pixels)" in out
    shutil.rmtree(root / "out")
    assert evaluate(root, "--positions", "mrope", "--resize_max_pixels", "6272") == 0
    assert "checkpoint says" not in capsys.readouterr().out


# Checkpoints


def test_weights_of_more_layers_than_the_config_has_are_refused(root: Path) -> None:
    config = json.loads((root / "model" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    config["text_config"].pop("layer_types", None)
    (root / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"holds weights of layers that its config\.json does not have"):
        Embedder.from_pretrained(root / "model", dtype="float32")


def test_a_config_of_another_width_is_refused_before_memory_is_taken(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hidden_size upstream would first make an embedding of width 8,192."""
    import transformers

    monkeypatch.setattr(transformers.Qwen2VLForConditionalGeneration, "from_pretrained", lambda *a, **k: 1 / 0)
    config = json.loads((root / "model" / "config.json").read_text())
    del config["text_config"]["hidden_size"]
    (root / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config.json gives hidden_size 8192, the weights have \d+; take both"):
        Embedder.from_pretrained(root / "model", dtype="float32")


def test_an_adapter_of_a_checkpoint_of_another_name_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal shapes: nothing else can tell."""
    assert train.main([str(root / "recipe.yaml")]) == 0
    capsys.readouterr()
    Embedder.from_pretrained(root / "model", root / "run", dtype="float32")
    assert "was trained on" not in capsys.readouterr().err
    shutil.copytree(root / "model", root / "instruct")
    other_weights(root / "instruct")
    Embedder.from_pretrained(root / "instruct", root / "run", dtype="float32")
    message = capsys.readouterr().err
    assert f"note: the adapter in {root / 'run'} was trained on {root / 'model'}, and is laid on" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: other_weights(root / "model"), r"data \(weights\)\.base was"),
        (lambda root: reverse(next((root / "data" / "words").glob("train*")), "qry"), r"data words\.fingerprint was"),
    ],
    ids=["weights", "rows"],
)
def test_a_run_goes_on_with_what_it_began_with(
    root: Path, change: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [str(root / "recipe.yaml"), "train.schedule=constant"]
    assert train.main(recipe) == 0
    change(root)
    assert train.main([*recipe, "train.steps=3"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_images_that_a_run_did_not_begin_with_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not refused: a broken image that ended the run may have been mended."""
    recipe = [str(root / "recipe.yaml"), "train.schedule=constant"]
    assert train.main(recipe) == 0
    other_pixels(root / "images")
    capsys.readouterr()
    assert train.main([*recipe, "train.steps=3"]) == 0
    assert "note: data set pictures: some images are not those the run began with" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_goes_on(root: Path) -> None:
    """Whose record knows neither weights nor images."""
    recipe = [str(root / "recipe.yaml"), "train.schedule=constant"]
    assert train.main(recipe) == 0
    record = json.loads((root / "run" / "data.json").read_text())
    del record["(weights)"]
    for facts in record.values():
        del facts["images"]
    (root / "run" / "data.json").write_text(json.dumps(record))
    assert train.main([*recipe, "train.steps=3"]) == 0


def test_libraries_that_changed_between_parts_of_a_run_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [str(root / "recipe.yaml"), "train.schedule=constant"]
    assert train.main(recipe) == 0
    file = root / "run" / "environment.json"
    before = json.loads(file.read_text())
    before["libraries"]["peft"] = "0.1"
    file.write_text(json.dumps(before))
    capsys.readouterr()
    assert train.main([*recipe, "train.steps=3"]) == 0
    assert "note: peft was '0.1', now" in capsys.readouterr().out


# Teachers and plans


def test_a_plan_of_a_teacher_that_was_made_anew_is_refused(root: Path) -> None:
    config = load_config(root / "recipe.yaml")
    mine_recipe(config)
    mine_recipe(config)
    teach(root, 1)
    with pytest.raises(InputError, match=r"holds another batch plan .teacher_key was"):
        mine_recipe(config)
    shutil.rmtree(root / "teacher")  # where only training runs, the teacher need not be
    load_plan(config, config.data.datasets[0], load_datasets(config)[0])


def test_vectors_of_a_teacher_that_was_trained_again_are_refused(root: Path) -> None:
    config = load_config(root / "recipe.yaml", [f"mining.teacher={root / 'model'}", "train.mask_teacher_margin=0.1"])
    mine_recipe(config)
    other_weights(root / "model")
    with pytest.raises(InputError, match=r"holds another batch plan .teacher_key was"):
        mine_recipe(config)
    for subset in ("pictures", "words"):
        shutil.rmtree(root / "mining" / subset)
    with pytest.raises(InputError, match=r"holds another teacher's vectors .teacher_key was"):
        mine_recipe(config)


def test_teachers_of_different_lengths_share_no_batch(root: Path) -> None:
    teach(root, 0, words=12)
    keys = ["train.mask_teacher_margin=0.1", "batch.policy=random_mixed"]
    config = load_config(root / "recipe.yaml", keys)
    with pytest.raises(RunError, match="pictures and words, which share batches, have 8 and 12 numbers"):
        open_teachers(config, load_datasets(config))
    config = load_config(root / "recipe.yaml", keys[:1])
    assert [queries.shape[1] for queries, _ in open_teachers(config, load_datasets(config))] == [8, 12]


def test_a_plan_of_the_same_rows_in_another_order_is_refused(root: Path) -> None:
    config = load_config(root / "recipe.yaml")
    mine_recipe(config)
    file = next((root / "data" / "words").glob("train*"))
    reverse(file, *pq.read_table(file).column_names)
    with pytest.raises(InputError, match="data_fingerprint was"):
        load_plan(config, config.data.datasets[1], load_datasets(config)[1])


def test_a_name_that_stands_for_two_images_is_refused(tmp_path: Path) -> None:
    for contents, is_fine in (([b"x", b"y", b"x"], True), ([b"x", b"y", b"z"], False)):
        pq.write_table(pa.table({"path": ["a", "b", "a"], "bytes": contents}), tmp_path / "images.parquet")
        store = ParquetImages(tmp_path / "images.parquet")
        if is_fine:
            assert store.read("a") == b"x"
        else:
            with pytest.raises(DataError, match=r"image 'a' stands twice in .* with different bytes"):
                store.read("b")


# Ranks


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (other_versions, "the versions of rank 1 differ from those of rank 0 (torch '1.0' there,"),
        (other_data, "the recipe and data of rank 1 differ from those of rank 0 (data.pictures.fingerprint 'other'"),
    ],
)
def test_ranks_that_differ_do_not_start(root: Path, prepare: Callable[[int], None], message: str) -> None:
    job = Job(root / "logs", str(root / "recipe.yaml"), ranks=2, prepare=prepare)
    assert job.wait() == [2, 2], job.text()
    assert message in job.text() and not (root / "run" / "metrics.jsonl").exists()


def test_a_recipe_is_the_same_on_all_ranks_but_for_places(root: Path) -> None:
    recipe = load_config(root / "recipe.yaml")
    moved = load_config(root / "recipe.yaml", ["output_dir=/x", "mining.dir=/y", "train.workers=3", "model.name=/z"])
    assert decisive(recipe.model_dump(mode="json")) == decisive(moved.model_dump(mode="json"))
    for key in ("train.lr=2", "seed=1", "adapter.r=2", "data.datasets.0.weight=0.5", "mining.p=3"):
        other = load_config(root / "recipe.yaml", [key])
        assert decisive(recipe.model_dump(mode="json")) != decisive(other.model_dump(mode="json")), key


def test_what_differs_between_ranks_is_named_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": 3}
    theirs: dict[str, Any] = {"a": {"b": 1, "c": 5}, "d": 3}
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, value])
    distributed.agree("facts", ours, "look")
    answers = iter([["1", "1", "2"], [ours, ours, theirs]])
    monkeypatch.setattr(distributed, "gather_objects", lambda value: next(answers))
    with pytest.raises(RunError, match=r"the facts of rank 2 differ from those of rank 0 \(a\.c 5 there, 2 here\)"):
        distributed.agree("facts", ours, "look")
