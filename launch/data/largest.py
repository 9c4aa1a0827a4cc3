"""In which step of a run a process sees its largest micro-batch, from the lengths of the records alone."""

from __future__ import annotations

import numpy as np

from launch.data.examples import Ints
from launch.data.order import DataOrder

RECORDS, EPOCHS = 2**21, 1000
"""The part of a run in which it is looked for, at most: half a second's work."""


def step_of_largest(
    order: DataOrder, lengths: Ints, own: slice, after: int, last: int, *, multiple: int | None
) -> int:
    """Return the first step of those after `after` to `last` that has it; of a long run the beginning tells.

    A micro-batch is as large as its positions, padding included. The largest of a step is its first, as the longest
    records come first.

    Args:
        lengths: tokens of each example.
        own: which of a step's records, longest first, the process takes first.
        multiple: what lengths are padded to; None where examples are packed.
    """
    last = min(last, after + max(1, min(RECORDS, EPOCHS * order.count) // order.batch_size))
    of_steps = lengths[order.stretch(after + 1, last)].reshape(-1, order.batch_size)
    first = -np.sort(-of_steps, axis=1)[:, own]
    sizes = first.sum(1) if multiple is None else -(-first[:, 0] // multiple)
    return after + 1 + int(np.argmax(sizes))
