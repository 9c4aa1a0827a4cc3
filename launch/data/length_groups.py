"""Batches of records of like length, so that little is padded: the order of an epoch, rearranged."""

from __future__ import annotations

import numpy as np

from flexlora_ds.rounding import ceil_div
from launch.data.examples import Ints
from launch.data.hashing import seeded_order

POOL = 50
"""At most so many batches have their records sorted together; in a small epoch a quarter of its batches."""


def grouped_by_length(order: Ints, lengths: Ints, batch_size: int, head: int, seed: int, epoch: int) -> Ints:
    """Return `order`, an epoch's indices, with the records of every whole batch of like length.

    The first `head` records, which fill up the batch that the epoch before began, and those left behind the last whole
    batch stay as they are: random. Between them pools of batches are sorted by length and divided again. The batches
    of the whole epoch are then shuffled, so that a step's lengths say nothing of when it comes.
    """
    count = max(0, len(order) - head) // batch_size
    if not count:
        return order
    whole = order[head : head + count * batch_size]
    pools = np.array_split(whole.reshape(count, batch_size), ceil_div(count, max(1, min(POOL, count // 4))))
    sorted_pools = [pool.reshape(-1)[np.argsort(lengths[pool.reshape(-1)], kind="stable")] for pool in pools]
    batches = np.concatenate(sorted_pools).reshape(count, batch_size)
    shuffled = batches[seeded_order(count, seed, "grouped batches", epoch)]
    return np.concatenate([order[:head], shuffled.reshape(-1), order[head + len(whole) :]])
