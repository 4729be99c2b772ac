"""Inputs of a step: every distinct item and image once, teacher vectors of the right rows."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from golden_data import NEGATIVES, GoldenPairs, checkpoint

from b3.model.backbones.qwen_vl_images import QwenVLProcessor
from b3.train.inputs import StepCollator


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> QwenVLProcessor:
    return QwenVLProcessor.from_pretrained(checkpoint(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("share", [True, False])
def test_chunks_hold_every_item_as_the_processor_makes_it(processor: QwenVLProcessor, share: bool) -> None:
    data, rows = GoldenPairs(), [0, 3, 3, 7]
    inputs = StepCollator([data], processor, 100, share_duplicates=share)([(0, r) for r in rows])  # type: ignore[list-item]
    items = [data.query(r) for r in rows] + [data.target(r) for r in rows]
    assert inputs.num_items == (len({i.key for i in items}) if share else 8)
    seen = {}
    for number in range(inputs.num_chunks):
        chunk = inputs.chunk(number)
        parts = chunk.batch.input_ids.split(chunk.batch.lengths)
        seen.update({int(row): ids for row, ids in zip(inputs.groups[number], parts, strict=True)})
        slots = 0 if chunk.batch.slots is None else len(chunk.batch.slots)
        assert slots == sum(inputs.images.sizes[p] // 4 for p in chunk.images)
        if slots:
            assert (chunk.batch.input_ids[chunk.batch.slots] == int(processor.media_ids[0])).all()
    index = [*inputs.query_index.tolist(), *inputs.target_index.tolist()]
    for position, item in zip(index, items, strict=True):
        assert np.array_equal(seen[position].numpy(), processor(item).input_ids)


@pytest.mark.parametrize("count", [2, 8])
def test_bytes_are_those_that_a_worker_sends(processor: QwenVLProcessor, count: int) -> None:
    inputs = StepCollator([GoldenPairs()], processor, 100)([(0, r) for r in range(count)])  # type: ignore[list-item]
    sent = len(pickle.dumps((None, inputs), protocol=5))
    assert inputs.images is not None and 0.8 * sent < inputs.nbytes < sent


def test_a_stray_image_token_is_no_slot(processor: QwenVLProcessor) -> None:
    class Stray(GoldenPairs):
        def query(self, row: int):
            return type(super().query(0))(f"{processor.image_token} alone {row}")

    inputs = StepCollator([Stray()], processor, 10**6)([(0, r) for r in range(4)])  # type: ignore[list-item]
    chunk = inputs.chunk(0)
    with_image = 0 if inputs.images is None else sum(inputs.images.sizes) // 4
    assert (0 if chunk.batch.slots is None else len(chunk.batch.slots)) == with_image


def test_teacher_vectors_follow_rows_and_negatives(processor: QwenVLProcessor) -> None:
    vectors = np.arange(24 * 3, dtype=np.float16).reshape(24, 3)
    negatives = NEGATIVES.copy()
    negatives[2, 1] = -1
    collator = StepCollator([GoldenPairs()], processor, 10**6, [negatives], teachers=[(vectors, -vectors)])  # type: ignore[list-item]
    inputs = collator([(0, 5), (0, 2)])
    assert inputs.teacher_queries[:, 0].tolist() == [15, 6]
    assert inputs.teacher_targets[:, 0].tolist() == [-15, -3 * 18, -3 * 19, -6, -3 * 12, -6]
    assert inputs.valid.tolist() == [True] * 5 + [False]
