"""Layers run compiled on all processes or on none.

A layer taken as it is gives its gradients in another order than a compiled one. ZeRO adds up what the processes have in
the same place of a bucket: gradients in two orders would be added to others' without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launch.distributed.agreement import largest
from launch.distributed.process import Process
from launch.model.compiled_blocks import give_up_compiled, layers_compiled


def agree_on_layers(model: Any, process: Process, compute_once: Callable[[], None]) -> None:
    """Where one process cannot compile its layers, take them as they are on all; collective.

    Args:
        compute_once: a pass, forward and backward, that changes nothing; for layers that no pass has tried yet.
    """
    if process.world_size > 1 and layers_compiled(model) is None:
        compute_once()
    if largest(process, [not layers_compiled(model)])[0]:
        give_up_compiled(model, "another process cannot compile them")
