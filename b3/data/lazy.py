"""A sequence whose elements are made when they are asked for, so that millions of them take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")


class Lazy(Sequence[T]):
    """`make(row)` of each of `rows`, a range or an array (N,) of integers, in their order. Slices are lazy too."""

    def __init__(self, make: Callable[[int], T], rows: range | np.ndarray) -> None:
        self._make, self._rows = make, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Lazy[T]: ...
    def __getitem__(self, place: int | slice) -> T | Lazy[T]:
        if isinstance(place, slice):
            return Lazy(self._make, self._rows[place])
        return self._make(int(self._rows[place]))
