"""A start from the gradient in a trainer: its first batches give the directions, and are trained on as ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from typing import Any

from torch import Tensor

from flexlora_ds.gradient.start import start_from_gradient


def take(batches: Iterator[Any], count: int) -> deque[Any]:
    """The first `count` micro-batches, or as many as the epoch has."""
    return deque(islice(batches, count))


def start_on(
    trainer: Any,
    engine: Any,
    batches: list[Any],
    accumulation: int,
    device: Any,
    get_batches: Callable[[Iterator[Any], int, Any], Any],
) -> None:
    """Replace the Gaussian P and Q along the gradient of the mean loss over `batches`; collective.

    Args:
        batches: this process's micro-batches of the first updates.
        accumulation: micro-batches of one update.
        get_batches: the Trainer's own, which counts an update's targets.
    """
    updates = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]

    def losses() -> Iterator[Tensor]:
        for update in updates:
            micro_batches, targets = get_batches(iter(update), len(update), device)
            for inputs in micro_batches:
                prepared = trainer._prepare_inputs(dict(inputs))
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, prepared, num_items_in_batch=targets)
                # The Trainer's loss is that of the mean gradient over processes.
                yield loss / (engine.world_size * len(updates))

    trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    with _figures_kept(trainer):
        start_from_gradient(engine, trainer.flexlora, losses)


@contextmanager
def _figures_kept(trainer: Any) -> Iterator[None]:
    """TRL's trainers count tokens and gather figures where they compute a loss; these passes train nothing."""
    names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(trainer, name)]
    kept = {name: deepcopy(getattr(trainer, name)) for name in names}
    try:
        yield
    finally:
        vars(trainer).update(kept)
