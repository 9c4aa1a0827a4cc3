"""The background thread that makes micro-batches: the same ones, the same errors, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from launch.data.batches import ProcessShare, TrainingBatches
from launch.data.prefetch import AHEAD, prefetched, training_feed
from tests.helpers.numbered_examples import PAD, make_examples, row_contents

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.mark.parametrize("done", [0, 3])
def test_the_micro_batches_are_those_of_the_steps_in_order(done: int) -> None:
    examples = make_examples(list(range(1, 24)), [size // 2 for size in range(1, 24)])
    batches = TrainingBatches(examples, 8, 1, ProcessShare(2, 1, 2), PAD)
    expected = [batch for step in range(done + 1, 8) for batch in batches.micro_batches(step)]
    with training_feed(batches, done, 7, CPU) as feed:
        found = [micro_batch for batch in feed for micro_batch in batch.micro_batches]
    assert len(found) == 2 * (7 - done)
    assert [row_contents(batch) for batch in found] == [row_contents(batch) for batch in expected]


def test_an_item_is_made_while_the_one_before_is_used_but_not_many() -> None:
    made: list[int] = []
    third = threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            assert threading.current_thread().name.startswith("prefetch")
            made.append(number)
            if number == AHEAD:
                third.set()
            yield number

    with prefetched(source()) as feed:
        assert next(feed) == 0
        assert third.wait(20), "made without being asked for"
        assert made == list(range(AHEAD + 1))


def test_an_error_comes_where_its_item_is_needed() -> None:
    def source() -> Iterator[int]:
        yield from (0, 1, 2)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone") as caught, prefetched(source()) as feed:
        for number in feed:
            found.append(number)
    assert found == [0, 1, 2]
    assert any(entry.name == "source" for entry in caught.traceback)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_a_run_that_fails_or_is_interrupted(fault: type[BaseException]) -> None:
    with pytest.raises(fault), prefetched(iter(range(10**9))) as feed:
        next(feed)
        raise fault


def test_a_run_that_stops_early_leaves_the_rest() -> None:
    examples = make_examples([5] * 40, [0] * 40)
    batches = TrainingBatches(examples, 4, 1, ProcessShare(1, 0, 2), PAD)
    with training_feed(batches, 0, 10**6, CPU) as feed:
        first, second = next(feed), batches.batch(1)
        assert [b.record_ids for b in first.micro_batches] == [b.record_ids for b in second.micro_batches]
        next(next(feed).micro_batches)
