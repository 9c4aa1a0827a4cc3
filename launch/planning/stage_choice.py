"""Whether ZeRO-3 was chosen where stage 2 would do, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexlora_ds.partitions.unsupported import lookup
from launch.data.batch_layout import BatchLayout
from launch.distributed.bandwidth import Rate
from launch.planning.memory_estimate import BYTES, GIB
from launch.planning.memory_plan import MemoryPlan


def needless_stage_three(plan: MemoryPlan, layout: BatchLayout, rate: Rate | None) -> str | None:
    """The warning; None where the base would not fit at stage 2, or the device's memory is unknown.

    Args:
        plan: that of the run, at stage 3.
        layout: how the run divides a global batch.
        rate: how fast the processes exchange numbers, where they are several.
    """
    if plan.limit is None:
        return None
    needed = replace(plan, settings=_at_stage_two(plan.settings)).at(layout.micro_batch_size)
    if needed.total > plan.limit:
        return None
    fits = f"at stage 2 this run takes {needed.total / GIB:.1f} of {plan.limit / GIB:.1f} GiB"
    base = plan.skeleton.parameters * BYTES[plan.dtype]
    offloaded = bool(lookup(plan.settings, "zero_optimization.offload_param.device") == "cpu")
    cost = _cost(base, layout, rate, offloaded=offloaded)
    return f"ZeRO stage 3 is not needed: {fits}; {cost}; choose ds_configs/zero2.json"


def _at_stage_two(settings: Mapping[str, Any]) -> dict[str, Any]:
    zero = {**settings["zero_optimization"], "stage": 2}
    zero.pop("offload_param", None)
    return {**settings, "zero_optimization": zero}


def _cost(base: int, layout: BatchLayout, rate: Rate | None, *, offloaded: bool) -> str:
    """The base is gathered in the forward and in the backward pass of each micro-batch."""
    whole = 2 * layout.accumulation_steps * base
    if rate is not None:
        moved = whole * (layout.processes - 1) / layout.processes
        return (
            f"stage 3 gathers the base twice a micro-batch: {moved / 1e9:.3g} GB a step, "
            f"{moved / rate.bytes_per_s:.2g} s at the {rate.bytes_per_s / 1e9:.3g} GB/s measured"
        )
    if offloaded:
        return f"stage 3 copies the base from the host twice a micro-batch: {whole / 1e9:.3g} GB a step"
    return "stage 3 divides nothing in one process, and its hooks take time at every layer"
