"""Construct a wrapper into the object that is there, without what its constructor does for a whole model.

Read from DeepSpeed 0.19.8. The names replaced are those that `DeepSpeedEngine._configure_*_optimizer` and the
constructors call; each is put back when the construction ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed.runtime.engine as engine_module
import deepspeed.runtime.zero.stage3 as stage3_module
import deepspeed.runtime.zero.stage_1_and_2 as stage_1_and_2_module
import torch
from torch import Tensor


@contextmanager
def constructing_in_place(engine: Any) -> Iterator[None]:
    """While active, the engine's own factory methods construct into the existing wrapper object.

    A new object would leave every other holder (accelerate's wrapper, user code, parameters' `_z3_optimizer`) with a
    dead one.
    """
    wrapper = engine.optimizer

    def build(*args: Any, **kwargs: Any) -> Any:
        wrapper.__init__(*args, **kwargs)
        return wrapper

    replaced: list[tuple[Any, str, Any]] = [
        (engine_module, "DeepSpeedZeroOptimizer", build),
        (engine_module, "FP16_UnfusedOptimizer", build),
        (stage3_module, "DeepSpeedZeroOptimizer_Stage3", build),
        (stage3_module, "defragment", flatten),
        (stage_1_and_2_module, "empty_cache", _keep_cache),
        (engine, "param_names", _Unprinted(engine.param_names)),
    ]
    with ExitStack() as stack:
        for place, name, substitute in replaced:
            stack.enter_context(patch.object(place, name, substitute))
        yield


def flatten(tensors: list[Tensor]) -> Tensor:
    """One flat tensor that the given ones become views of: `defragment` without its garbage collection.

    DeepSpeed's copies through the CPU, walks every object of the process and empties the accelerator's cache, to make
    room for a whole model's partitions. Adapters need no room, and the next step would allocate the cache anew.
    """
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for tensor, view in zip(tensors, torch.split(flat, sizes), strict=True):
        tensor.data = view.view(tensor.shape)
    return flat


def _keep_cache() -> None:
    """In place of emptying the accelerator's cache, which also resets its peak of allocated memory."""


class _Unprinted(dict[Any, Any]):
    """A map that prints short: ZeRO-3's constructor formats its arguments, names of all parameters included."""

    def __repr__(self) -> str:
        return f"<{len(self)} names>"
