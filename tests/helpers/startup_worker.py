"""Training commands whose machine is made up: the links, the clock, the memory."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flexlora_ds import FlexLoRAConfig
from flexlora_ds.partitions import try_backward
from launch.distributed.bandwidth import measure_rate
from launch.distributed.link import Link
from launch.distributed.process import join_processes
from launch.planning.memory_estimate import GIB
from launch.planning.memory_plan import MemoryPlan
from tests.helpers import tiny, training

NVLINK = Link("NVLink (12 links)", 300.0, 1 / 4)


def clock(seconds: float) -> Any:
    """A clock by which anything takes so long."""
    return partial(next, itertools.count(0.0, seconds))


def rate(seconds: float) -> dict[str, Any]:
    """What the all-reduces of these processes say by such a clock."""
    found = measure_rate(join_processes(), clock(seconds))
    assert found is not None
    return {"size": found.size, "seconds": found.seconds, "GB/s": found.bytes_per_s / 1e9, "text": str(found)}


def on_a_slow_link(arguments: list[str], seconds: float) -> dict[str, Any]:
    """The command on GPUs that NVLink joins, between which every all-reduce takes so long."""
    with (
        patch("launch.train.measure_rate", partial(measure_rate, clock=clock(seconds))),
        patch("launch.train.find_link", lambda process, members: NVLINK),
    ):
        return without_report(arguments)


def on_a_device_of(gigabytes: float, arguments: list[str]) -> dict[str, Any]:
    """The command on a device with so much memory."""
    with patch.object(MemoryPlan, "limit", gigabytes * GIB):
        return without_report(arguments)


def without_report(arguments: list[str]) -> dict[str, Any]:
    """The command, which draws no pictures at its end."""
    with patch("launch.loop.finish.report_line", return_value=""):
        return training.command(arguments)


def after_a_trial(stage: int, dtype: str) -> dict[str, Any]:
    """What a backward pass that an engine is not to notice has left in it."""
    _, world = tiny.start()
    config = FlexLoRAConfig(rank=3, dropout=0.0)
    ds = tiny.ds_config(stage, dtype, world)
    engine = tiny.make_engine(tiny.adapted_llama(config, dtype), config, ds)
    parameters = list(engine.module.parameters())
    rows = tiny.records(4)
    before = _gathered(parameters)
    loss = tiny.token_loss(engine.module, rows)
    try_backward(engine, loss)
    found = {
        "gradients": sum(p.grad is not None for p in parameters),
        "gathered": _gathered(parameters) - before,
        "hooks": sum(len(p._backward_hooks or ()) for p in parameters),
        "counts": [engine.micro_steps, engine.global_steps, engine.global_samples],
    }
    again = tiny.token_loss(engine.module, rows)
    return {**found, "same loss": bool(torch.equal(loss, again))}


def _gathered(parameters: list[Any]) -> int:
    """How many of ZeRO-3's parameters are whole, but for those that it keeps whole."""
    divided = [p for p in parameters if hasattr(p, "ds_status") and not p.ds_persist]
    return sum(p.ds_status.name != "NOT_AVAILABLE" for p in divided)


def without_memory(arguments: list[str], failing: list[int]) -> dict[str, Any]:
    """The command, on some processes of which the memory check asks the allocator for more than there is."""
    rank = join_processes().rank
    with ExitStack() as stack:
        if rank in failing:
            stack.enter_context(patch("launch.loop.memory_check.token_loss", _impossible))
        return training.command(arguments)


def _impossible(*_: object) -> Tensor:
    return torch.empty(2**50, dtype=torch.uint8)
