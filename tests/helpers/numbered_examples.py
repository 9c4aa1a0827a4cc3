"""Examples whose token ids are all distinct, and what a batch holds of them."""

from __future__ import annotations

import numpy as np

from launch.data.batches import MicroBatch
from launch.data.examples import Examples

PAD = 7


def make_examples(lengths: list[int], label_starts: list[int]) -> Examples:
    """Examples of these lengths. Their token ids are all distinct: a mix-up cannot go unnoticed."""
    ends = np.cumsum(lengths)
    tokens = [
        np.arange(100 + end - size, 100 + end, dtype=np.int32)
        for size, end in zip(lengths, ends, strict=True)
    ]
    learnt = [np.arange(size) >= start for size, start in zip(lengths, label_starts, strict=True)]
    return Examples.pack(zip(range(1, 3 * len(lengths) + 1, 3), tokens, learnt, strict=True))


def row_contents(batch: MicroBatch) -> list[tuple[int, list[int], list[int], list[int], list[int]]]:
    """What each row of a batch holds, padding removed."""
    rows = []
    for row, record in enumerate(batch.record_ids):
        real = batch.attention_mask[row].bool()
        columns = (batch.input_ids, batch.labels, batch.position_ids, batch.row_keys)
        rows.append((record, *(column[row][real].tolist() for column in columns)))
    return rows
