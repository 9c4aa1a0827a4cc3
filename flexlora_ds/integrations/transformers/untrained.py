"""A run without a single applied update leaves no adapter: it would look like a success."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import has_length

from flexlora_ds.errors import RunError, UserError
from flexlora_ds.terminal.counted import counted

_NO_BATCH = "give more records, a smaller per_device_train_batch_size, or leave dataloader_drop_last out"


def require_records(dataset: Any) -> None:
    """Raise UserError where a dataset is known to be empty."""
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise UserError("there is no record to train on", "train_dataset", "give a dataset that is not empty")


def require_batches(loader: Any) -> None:
    """Raise UserError where a dataloader is known to give no batch."""
    if has_length(loader) and len(loader) == 0:
        raise UserError("the records do not fill one batch", "train_dataset", _NO_BATCH)


def require_steps(total_steps: int, args: Any) -> None:
    """Raise UserError where a run would end before its first step."""
    if total_steps < 1:
        given = f"max_steps {args.max_steps}, num_train_epochs {args.num_train_epochs:g}"
        raise UserError("the run has no step", given, "give at least one")


def require_taken(trainer: Any) -> None:
    """Raise UserError where not one step has been taken."""
    if trainer.state.global_step == 0:
        raise UserError("no step was taken, for the data gave no batch", "train_dataset", _NO_BATCH)


def require_applied(trainer: Any, engine: Any) -> None:
    """Raise RunError where every update was skipped: the adapter is still what it began with."""
    steps = trainer.state.global_step
    if engine.skipped_steps >= steps:
        raise RunError(
            "every update was skipped, so nothing was learnt",
            counted(steps, "step"),
            "lower learning_rate, or train in bf16 or fp32; no adapter is written",
        )
