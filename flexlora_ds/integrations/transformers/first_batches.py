"""A start from the gradient in a trainer: its first batches give the directions, and are trained on as ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from itertools import islice
from typing import Any

from torch import Tensor
from transformers import Trainer

from flexlora_ds.errors import UserError
from flexlora_ds.gradient.start import start_from_gradient
from flexlora_ds.rounding import ceil_div

_OF_TRL = (
    "_metrics",
    "_total_train_tokens",
    "_logs",
    "_pending_extra_logs",
    "_pending_metrics",
    "_step",
    "_buffered_inputs",
)
"""What TRL's trainers count, gather and keep of the batches that they have generated."""


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
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    with _untouched(trainer):
        ready = list(_prepared(trainer, batches, accumulation, device, get_batches))
        updates = ceil_div(len(batches), accumulation)

        def losses() -> Iterator[Tensor]:
            for inputs, targets in ready:
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=targets)
                # The Trainer's loss is that of the mean gradient over processes.
                yield loss / (engine.world_size * updates)

        start_from_gradient(engine, trainer.flexlora, losses)


def _prepared(
    trainer: Any, batches: list[Any], accumulation: int, device: Any, get_batches: Callable[..., Any]
) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """What the loss is computed of, by micro-batch, with the number of its update's targets.

    Once for both passes: trainers of TRL that generate their own records (GRPO) would generate others the next time.
    """
    for i in range(0, len(batches), accumulation):
        update = batches[i : i + accumulation]
        micro_batches, targets = get_batches(iter(update), len(update), device)
        for inputs in micro_batches:
            of_one = dict(inputs) if isinstance(inputs, Mapping) else inputs
            prepared = trainer._prepare_inputs(of_one)
            _require_inputs(trainer, prepared)
            yield prepared, targets
            if hasattr(trainer, "_step"):
                trainer._step += 1


def _require_inputs(trainer: Any, prepared: Mapping[str, Any]) -> None:
    """Raise UserError where a trainer makes the model's inputs in `training_step` alone, as TRL's online DPO does."""
    taken = signature(trainer.model.forward).parameters
    if type(trainer).compute_loss is Trainer.compute_loss and not set(taken) & set(prepared):
        raise UserError(
            "this trainer's batches hold nothing that the model takes, so they have no gradient to begin from",
            "init",
            'give FlexLoRAConfig(init="gaussian")',
        )


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """These passes train nothing: TRL's trainers go on as if there had been none."""
    kept = {name: deepcopy(getattr(trainer, name)) for name in _OF_TRL if hasattr(trainer, name)}
    try:
        yield
    finally:
        vars(trainer).update(kept)
