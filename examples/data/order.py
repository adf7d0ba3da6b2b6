"""The order of an epoch's samples: a permutation from (seed, epoch).

So sample i depends on i alone.
"""

from __future__ import annotations

import numpy


class Order:
    """``Order(count, seed)(i)`` is the item, from 0 to count - 1, of sample i >= 0.

    Every item comes once an epoch.
    """

    def __init__(self, count: int, seed: int) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed takes 0 to 2³² - 1, got {seed}")
        self.count, self.seed = count, seed
        self._epoch: int | None = None
        self._items = numpy.empty(0, dtype=numpy.uint32)

    def __call__(self, i: int) -> int:
        if i < 0:
            raise IndexError(f"sample takes a number from 0 on, got {i}")
        epoch, position = divmod(int(i), self.count)
        if epoch != self._epoch:
            # NumPy promises of RandomState alone that its numbers stay the same in every release.
            numbers = numpy.random.RandomState([self.seed, epoch])
            self._items = numbers.permutation(self.count).astype(numpy.uint32)
            self._epoch = epoch
        return int(self._items[position])
