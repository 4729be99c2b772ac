"""A step over rows with several images, positives, options and directions: a plain pass over everything, by formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
import torch
from torch.nn.functional import normalize

from b3 import Embedder
from b3.config import load_config
from b3.data.datasets import PairDataset
from b3.data.images import open_store
from b3.data.items import Item
from b3.errors import ConfigError, RunError
from b3.model.adapter import AdapterSpec, attach_adapter
from b3.model.batch import collate
from b3.train.build import check_stored_negatives, facts_of_data
from b3.train.inputs import StepCollator
from b3.train.losses.info_nce import InfoNCE
from b3.train.step import CachedStep

pytestmark = pytest.mark.core

NAMES = [f"{i:04}.png" for i in range(12)]
ROWS: list[dict[str, Any]] = [
    {"qry": "", "qry_image_path": NAMES[:2], "pos_text": ["red", "a red disc"], "pos_image_path": [[], [NAMES[2]]],
     "neg_text": ["blue", "", "green"], "neg_image_path": [[], NAMES[3:5], []]},
    {"qry": "what is shown?", "qry_image_path": [NAMES[5]], "pos_text": ["a bar"], "pos_image_path": [[]],
     "neg_text": [], "neg_image_path": []},
    {"qry": "a number", "qry_image_path": [], "pos_text": ["a red disc", "two"], "pos_image_path": [[NAMES[2]], []],
     "neg_text": ["three"], "neg_image_path": [[NAMES[6]]]},
    {"qry": "yes or no?", "qry_image_path": [NAMES[7]], "pos_text": ["yes"], "pos_image_path": [[]],
     "neg_text": ["no"], "neg_image_path": [[]]},
]  # fmt: skip
ASKED = {"qry_instruction": "find", "pos_instruction": ""}
H = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rich")
    tiny.write_data(root / "data")
    tiny.write_model(root / "model")
    return root


def dataset(root: Path, rows: list[dict[str, Any]], name: str = "rich") -> PairDataset:
    table = pa.Table.from_pylist([{**row, **ASKED} for row in rows])
    return PairDataset(name, table, open_store(root / "data" / "images.parquet"))


def student(root: Path) -> Embedder:
    model = Embedder.from_pretrained(root / "model", dtype="float32", prompt="vlm2vec")
    torch.manual_seed(0)
    model.backbone = attach_adapter(model.backbone, AdapterSpec(4, 8, 0.0, False, target_modules=("q_proj",)))
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def by_formula(model: Embedder, data: list[PairDataset], places: list[tuple[int, int]], closed: set[int], taus: Any):
    """The mean loss in one graph: for each pair a sum over every candidate that is not known to be right.

    Everything is looked up in the rows: what is equal, what the row calls right, what its options are.
    """

    def vector(item: Item) -> torch.Tensor:
        return normalize(model(collate([model.processor(item)]), normalize=False)[0].double(), dim=0)

    pairs = [(d, data[d].query(r), data[d].target(r), data[d].positives(r), data[d].negatives(r)) for d, r in places]
    q, t = [vector(pair[1]) for pair in pairs], [vector(pair[2]) for pair in pairs]
    negatives = [[vector(item) for item in pair[4]] for pair in pairs]
    total: Any = 0
    for i, (d, query, target, right, _) in enumerate(pairs):
        tau, terms = taus[d], [q[i] @ t[i]]
        for k, (j, item) in enumerate((j, item) for j, pair in enumerate(pairs) for item in pair[4]):
            of_all = [vector for vectors in negatives for vector in vectors]
            if item.key in {one.key for one in right} or (d in closed and j != i):
                continue
            terms.append(q[i] @ of_all[k])
            if j != i:
                terms.append(t[i] @ of_all[k])
        terms += [] if d in closed else [t[i] @ q[i]]
        for j, (_, other, found, also, _) in enumerate(pairs):
            if j == i or d in closed:
                continue
            is_equal = other.key == query.key or found.key == target.key
            knows, known = found.key in {one.key for one in right}, target.key in {one.key for one in also}
            terms += [] if is_equal or knows else [q[i] @ t[j], t[i] @ t[j]]
            terms += [] if is_equal or known else [t[i] @ q[j]]
            terms += [] if is_equal or knows or known else [q[i] @ q[j]]
        total = total + torch.logsumexp(torch.stack(terms) / tau, 0) - terms[0] / tau
    return total / len(pairs)


@pytest.mark.parametrize("chunk_tokens", [30, 10**6])
def test_the_step_is_the_formula(root: Path, chunk_tokens: int) -> None:
    data = [dataset(root, ROWS[:3]), dataset(root, ROWS[3:], "closed")]
    places = [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4)]
    assert len(data[0]) == 5 and data[0].most_positives == 2
    model, gradients = student(root), []
    collator = StepCollator(
        data,
        model.processor,
        chunk_tokens,
        stored_negatives=H,
        temperatures=[0.05, 0.2],
        closed=[False, True],
        num_known=2,
    )
    inputs = collator(places)
    assert (inputs.num_chunks > 1) == (chunk_tokens == 30)
    result = CachedStep(model, InfoNCE(1.0, directions=["qt", "tq", "qq", "tt"]))(inputs, 0)
    gradients.append(tiny.gradients(model))
    expected = by_formula(model, data, places, {1}, [0.05, 0.2])
    expected.backward()
    gradients.append(tiny.gradients(model))
    assert result.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[1].items():
        assert tiny.relative(gradients[0][name], value) < 1e-5, name


def test_what_a_recipe_says_of_the_data(root: Path) -> None:
    entries = [{"subset": "a", "family": "vqa", "closed": True}, {"subset": "b"}]
    temperature = {"vqa": 0.1, "retrieval": 0.03}
    negatives = {"source": "data", "per_query": 3}
    recipe = tiny.write_recipe(
        root, data={"datasets": entries}, train={"temperature": temperature}, negatives=negatives
    )
    config = load_config(recipe)
    facts = facts_of_data(config, [dataset(root, ROWS[3:]), dataset(root, ROWS[:3])])
    assert facts == {"temperatures": [0.1, 0.03], "closed": [True, False], "num_known": 2}
    check_stored_negatives(config, [dataset(root, ROWS[3:], "a"), dataset(root, ROWS[:3])])
    with pytest.raises(RunError, match=r"a is closed and its row 1, positive 0 brings no other option"):
        check_stored_negatives(config, [dataset(root, ROWS[:3], "a"), dataset(root, ROWS)])
    fewer = load_config(recipe, ["negatives.per_query=2"])
    with pytest.raises(RunError, match=r"a is closed and its row 0, positive 0 brings 3 other options; raise"):
        check_stored_negatives(fewer, [dataset(root, ROWS[:1], "a"), dataset(root, ROWS)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.directions=[qq, tt]", "must hold qt, and each direction once"),
        ("train.directions=[qt, qt]", "must hold qt, and each direction once"),
        ("train.directions=[qt, tx]", "train.directions"),
        ("train.temperature={vqa: 0.1}", "train.temperature has none for family retrieval"),
        ("train.temperature={vqa: 0}", "train.temperature"),
        ("train.temperature={faces: 0.1}", "train.temperature"),
        ("data.datasets.0.closed=true", "pictures is closed: .* set negatives.source=data and negatives.per_query"),
    ],
)
def test_what_cannot_be_meant(root: Path, override: str, message: str) -> None:
    recipe = tiny.write_recipe(root, "plain.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [override])


def test_one_sum_or_the_mean_of_two(root: Path) -> None:
    recipe = tiny.write_recipe(root, "plain.yaml")
    with pytest.raises(ConfigError, match=r"train.symmetric takes the mean of two sums"):
        load_config(recipe, ["train.directions=[qt, tq]", "train.symmetric=true"])
    with pytest.raises(ConfigError, match="learns one number, not one per family"):
        load_config(recipe, ["train.temperature={retrieval: 0.1}", "train.learn_temperature=true"])
