"""The engine that a trainer has built: DeepSpeed's, or plain torch with the same face."""

from __future__ import annotations

from typing import Any

from flexlora_ds.partitions import TorchEngine, skip_non_finite


def engine_of(trainer: Any) -> Any:
    """What rank changes work on, once the Trainer has wrapped the model and made the optimizer.

    An update whose gradients are not finite is skipped from now on, on all processes alike, as ZeRO does by itself.
    """
    if trainer.is_deepspeed_enabled:
        engine = trainer.deepspeed
        skip_non_finite(engine)
        return engine
    scaler = getattr(trainer.accelerator, "scaler", None)
    ours = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    plain = TorchEngine(
        trainer.model_wrapped, ours, accumulation_steps=trainer.args.gradient_accumulation_steps
    )
    if scaler is None:
        skip_non_finite(plain)
    else:
        plain.loss_scale = scaler.get_scale
    return plain


def count_update(trainer: Any, engine: Any) -> None:
    """After an update: the engine's counts as those of the Trainer, whose loop it is.

    Accelerate steps an engine once for an update, so DeepSpeed's own count of micro-steps would be another.
    """
    done = trainer.state.global_step
    engine.micro_steps = done * engine.gradient_accumulation_steps()
    if isinstance(engine, TorchEngine):
        engine.global_steps = done
        overflow = getattr(engine.optimizer, "overflow", False)
        engine.skipped_steps += int(overflow or trainer.accelerator.optimizer_step_was_skipped)
