"""The order of the data: a pure function of the seed.

The training data is one endless stream: the examples of epoch 0 in a seeded order (arranged into batches of like
length, where that is asked for), then those of epoch 1 in another, and so on. Step t (from 1) takes
`stream[(t − 1)·B : t·B]`, B the global batch size. Nothing is remembered between steps, so a resume at any step, on
any number of processes, needs no state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from launch.data.examples import Ints
from launch.data.hashing import seeded_order
from launch.data.length_groups import grouped_by_length


class DataOrder:
    """The stream of indices into `count` examples, and the piece of it that each step takes."""

    def __init__(self, count: int, batch_size: int, seed: int, lengths: Ints | None = None) -> None:
        """With `lengths`, one an example, batches are of like length (`launch.data.length_groups`)."""
        self.count = count
        self.batch_size = batch_size
        self._seed = seed
        self._lengths = lengths
        self._epoch = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> Ints:
        order = seeded_order(self.count, self._seed, "order", epoch)
        if self._lengths is None:
            return order
        head = -epoch * self.count % self.batch_size
        return grouped_by_length(order, self._lengths, self.batch_size, head, self._seed, epoch)

    def indices(self, step: int) -> Ints:
        """Return the batch_size indices of step `step` (from 1), in the order of the stream."""
        return self.stretch(step, step)

    def stretch(self, first_step: int, last_step: int) -> Ints:
        """Return the indices of several steps, one behind the other."""
        first, last = (first_step - 1) * self.batch_size, last_step * self.batch_size
        pieces = []
        for epoch in range(first // self.count, (last - 1) // self.count + 1):
            start = epoch * self.count
            pieces.append(self._epoch(epoch)[max(first - start, 0) : last - start])
        return np.concatenate(pieces)

    def epoch(self, step: int) -> float:
        """Return how many times the data has been seen after step `step`."""
        return step * self.batch_size / self.count
