"""The DeepSpeed configuration of a trainer: what it lacks for our optimizer, and the `auto`s that nobody else fills."""

from __future__ import annotations

from typing import Any


def deepspeed_settings(trainer: Any) -> dict[str, Any]:
    """The configuration as the Trainer holds it, to be read and completed."""
    settings: dict[str, Any] = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    return settings


def complete(trainer: Any) -> None:
    """Let DeepSpeed take an optimizer that it does not ship, on the CPU too; before the engine is made.

    `allgather_bucket_size: auto` becomes what the Trainer makes of `reduce_bucket_size: auto`, the square of the
    model's width: accelerate knows the one and not the other. `overlap_comm: auto` becomes true at stage 3.
    """
    if not trainer.is_deepspeed_enabled:
        return
    settings = deepspeed_settings(trainer)
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    zero = settings.get("zero_optimization", {})
    if zero.get("allgather_bucket_size") == "auto":
        config = getattr(trainer.model.config, "text_config", trainer.model.config)
        zero["allgather_bucket_size"] = int(config.hidden_size) ** 2
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = zero.get("stage") == 3
