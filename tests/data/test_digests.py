"""Equal rows are found by digests in arrays, as a dictionary would find them."""

from __future__ import annotations

import numpy as np
import pytest

from b3.data.digests import digest, first_seen, joined
from b3.data.items import Item, key_digests


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("rows", [0, 1, 2, 500])
def test_first_seen_is_what_a_dictionary_gives(size: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    digests = rng.integers(0, 2, (rows, size), dtype=np.uint8) * np.uint8(255)
    digests[:, 2:] = 7  # 4 kinds, that differ in the first word
    if size > 8 and rows:
        digests[rows // 2 :, size - 1] = 9  # and in the last
    number_of: dict[bytes, int] = {}
    expected = [number_of.setdefault(bytes(row), len(number_of)) for row in digests]
    first, number = first_seen(digests)
    assert number.tolist() == expected
    assert first.tolist() == [expected.index(i) for i in range(len(number_of))]
    assert np.array_equal(digests[first[number]], digests)


def test_digests_tell_items_apart_as_keys_do() -> None:
    items = [
        Item("a"),
        Item("a", instruction=""),
        Item("a\0", instruction="b"),
        Item("a", instruction="\0b"),
        Item(""),
        Item(None),
        Item("\ud800"),
        Item("a"),
    ]
    assert len({item.key for item in items}) == 7
    digests = key_digests(items)
    assert digests.shape == (8, 16) and len({bytes(row) for row in digests}) == 7
    assert bytes(digests[0]) == bytes(digests[7]) == digest(items[0].key)
    assert joined([]).shape == (0, 16)
