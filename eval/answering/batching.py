"""Splitting items into batches of similar length, and padding token rows into tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.items import Item
from flexlora_ds.rounding import ceil_div

_ENOUGH = 8  # a batch of an eighth of the budget is large enough to be fast
_WORTHWHILE = (
    0.9  # the least length, as a share of the batch's width, for which such a batch is filled further
)


@dataclass(frozen=True)
class Batch:
    """Items of one task that are computed together; `width` is the cost of the widest row, in tokens."""

    task: str
    items: tuple[Item, ...]
    width: int

    @property
    def tokens(self) -> int:
        """Tokens in the batch, padding included."""
        return self.width * len(self.items)

    def halves(self) -> tuple[Batch, Batch]:
        """The batch split in two, for a retry in less memory."""
        middle = (len(self.items) + 1) // 2
        return (
            Batch(self.task, self.items[:middle], self.width),
            Batch(self.task, self.items[middle:], self.width),
        )


def plan_batches(
    task: str, items: Iterable[Item], cost: Callable[[Item], int], budget: int, max_rows: int | None = None
) -> list[Batch]:
    """Sort by length, longest first, and fill batches up to `budget` tokens and `max_rows` rows.

    A batch's tokens are its rows times the widest of them; an item wider than the budget is a batch of its own. A batch
    that is large enough to be fast ends early where the next item would be mostly padding.
    """
    ordered = sorted(items, key=lambda item: (-cost(item), item.question.index))
    batches: list[Batch] = []
    start = 0
    while start < len(ordered):
        width = cost(ordered[start])
        most = min(max(1, budget // width), max_rows or len(ordered), len(ordered) - start)
        enough = ceil_div(budget, _ENOUGH * width)
        rows = most
        for row in range(enough, most):
            if cost(ordered[start + row]) < _WORTHWHILE * width:
                rows = row
                break
        batches.append(Batch(task, tuple(ordered[start : start + rows]), width))
        start += rows
    return batches


def order_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Widest first, across tasks: memory runs out at the start or never, and processes finish on short batches."""
    return sorted(batches, key=lambda batch: (-batch.width, batch.task, batch.items[0].question.index))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, widest row], padding on the left and masked."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
