"""Batches hold every item once, keep to their budget and waste little on padding."""

from __future__ import annotations

import random

import pytest

from eval.answering.batching import order_batches, plan_batches
from eval.items import Item, Question


def make_items(lengths: list[int]) -> list[Item]:
    questions = [Question("boolq", i, str(i), ("true", "false"), "true") for i in range(len(lengths))]
    return [Item(q, (7,) * n, ((1,), (2,))) for q, n in zip(questions, lengths, strict=True)]


def length(item: Item) -> int:
    return len(item.prompt)


@pytest.mark.parametrize("budget", [1, 64, 512, 4096])
@pytest.mark.parametrize("max_rows", [None, 1, 5])
def test_every_item_once_within_the_budget(budget: int, max_rows: int | None) -> None:
    rng = random.Random(budget)
    items = make_items([rng.randint(1, 120) for _ in range(200)])
    batches = order_batches(plan_batches("boolq", items, length, budget, max_rows))
    assert sorted(i.question.index for b in batches for i in b.items) == list(range(200))
    for batch in batches:
        assert batch.width == max(map(length, batch.items))
        assert batch.tokens <= budget or len(batch.items) == 1
        assert len(batch.items) <= (max_rows or 200)
    assert [b.width for b in batches] == sorted((b.width for b in batches), reverse=True)


def test_padding_is_small_and_batches_are_not() -> None:
    rng = random.Random(0)
    lengths = [round(20 + rng.expovariate(1 / 40)) for _ in range(1000)]
    batches = plan_batches("boolq", make_items(lengths), length, 4096)
    assert sum(b.tokens for b in batches) < 1.06 * sum(lengths)
    small = [b for b in batches[:-1] if b.tokens < 4096 // 8]
    assert not small


def test_items_of_equal_length_fill_the_budget() -> None:
    batches = plan_batches("boolq", make_items([10] * 100), length, 320)
    assert [len(b.items) for b in batches] == [32, 32, 32, 4]


def test_halves_keep_all_items() -> None:
    (batch,) = plan_batches("boolq", make_items([10, 9, 9]), length, 320)
    first, second = batch.halves()
    assert first.items + second.items == batch.items
    assert len(first.items) == 2
