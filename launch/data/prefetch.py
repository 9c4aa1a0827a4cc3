"""The next micro-batches are made by a thread while the model computes the current one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TypeVar

import torch

from launch.data.batches import GlobalBatch, MicroBatch, TrainingBatches

T = TypeVar("T")
AHEAD = 2
"""Micro-batches that are ready or are being made: one step's last is followed by the next step's first."""


@contextmanager
def training_feed(
    batches: TrainingBatches, done: int, last: int, device: torch.device
) -> Iterator[Iterator[GlobalBatch]]:
    """The batches of the steps after `done` to `last`; pinned where `device` is a GPU.

    Their micro-batches come from one thread, over the bounds of steps: take all of a batch before the next batch.
    """
    on_gpu = device.type == "cuda"
    steps = range(done + 1, last + 1)
    stream = (micro_batch for step in steps for micro_batch in batches.micro_batches(step))
    made = map(MicroBatch.pinned, stream) if on_gpu else stream
    with prefetched(made, device if on_gpu else None) as feed:
        yield (batches.batch(step, islice(feed, batches.accumulation)) for step in steps)


@contextmanager
def prefetched(source: Iterable[T], device: torch.device | None = None) -> Iterator[Iterator[T]]:
    """What `source` yields, in its order, made by one thread up to AHEAD items before it is asked for.

    What `source` raises is raised where its item is asked for. The thread, whose current GPU is `device`, ends with
    the `with` block, however that is left.
    """
    choose_gpu = None if device is None else partial(torch.cuda.set_device, device)
    thread = ThreadPoolExecutor(1, "prefetch", choose_gpu)
    items, end = iter(source), object()
    waiting: deque[Future[T | object]] = deque(thread.submit(next, items, end) for _ in range(AHEAD))

    def feed() -> Iterator[T]:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]

    try:
        yield feed()
    finally:
        thread.shutdown(cancel_futures=True)
