"""Undo what DeepSpeed's wrappers do to the optimizer while they are constructed."""

from __future__ import annotations

from typing import Any


def forget_construction(engine: Any) -> None:
    """Before the first step, drop optimizer state that came from construction alone.

    FP16_UnfusedOptimizer (stage 0 with bf16 or fp16; unfused_optimizer.py `initialize_optimizer_states`, 0.19.8) runs
    one step with zero gradients: the step count and every age would start at 1 at that stage only.
    """
    if engine.global_steps == 0:
        engine.basic_optimizer.state.clear()
